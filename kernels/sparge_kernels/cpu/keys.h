// K and V of one kv head, ready for every query tile: means, INT8 codes, self-similarity and packed values.
// The numbers are those of predict.py and quantize.py; reference.py has the reasons.
#pragma once

#include <type_traits>
#include <vector>

#include "inputs.h"

namespace sparge {

constexpr float OUTLIER_RATIO = 5.0f;  // quantize.py
constexpr float LARGEST_CODE = 127.0f;
constexpr int MAX_DIM = 256;  // checks.py

constexpr int CLUSTERS = 4;   // clusters.py
constexpr float LOUDEST = 1.5f;

// Means of clusters meet queries in bf16 where the CPU can: a score of 50 nats then errs by some hundredths.
#if defined(SPARGE_BF16_DOT)
using ClusterDot = DotBFloat16;
using ClusterNumber = int32_t;  // 2 channels
#else
using ClusterDot = DotFloat;
using ClusterNumber = float;
#endif
constexpr int CHANNELS_PER_NUMBER = sizeof(ClusterNumber) / (std::is_same<ClusterDot, DotFloat>::value ? 4 : 2);

// Codes as a product reads them: a granule of Q's is CODES of Code + CODE_OFFSET, one of K's without the offset.
#if defined(SPARGE_INT8_DOT)
using CodeDot = DotInt8;
using Code = int8_t;
constexpr int CODE_OFFSET = 128;
#elif defined(SPARGE_INT16_DOT)
using CodeDot = DotInt16;
using Code = int16_t;
constexpr int CODE_OFFSET = 0;
#else
using CodeDot = DotFloat;
using Code = float;
constexpr int CODE_OFFSET = 0;
#endif
constexpr int CODES = 4 / sizeof(Code);

struct KeyTiles {
    int count = 0, dim = 0, value_dim = 0;
    int padded = 0;        // dim rounded up to whole vectors: rows of means and centres
    int value_padded = 0;  // the same of value_dim
    int code_dim = 0;      // dim rounded up to whole granules
    std::vector<float> means, centres;     // [count][padded]
    std::vector<float> similarity;         // [count], NaN where a number is not finite: below every threshold
    std::vector<float> scales;             // [count]
    std::vector<uint8_t> exact;            // [count]: INT8 cannot hold the tile
    std::vector<uint8_t> finite_values;    // [count]
    std::vector<uint8_t> finite;           // [count]: every number of K and V; their tiles have clusters
    std::vector<Code> codes;               // [count][K_TILE][code_dim]
    std::vector<int32_t> starts;           // [count][K_TILE]: -CODE_OFFSET * sum of a key's codes
    std::vector<int32_t> values;           // [count][K_TILE / 2][value_padded]: pairs of keys in bf16
    std::vector<ClusterNumber> cluster_means;            // [count][CLUSTERS][padded / CHANNELS_PER_NUMBER]
    std::vector<float> cluster_sizes, cluster_spreads;  // [count][CLUSTERS]

    void resize(const Call& call) {
        count = static_cast<int>(ceil_div(call.k_len, K_TILE));
        dim = static_cast<int>(call.dim);
        value_dim = static_cast<int>(call.value_dim);
        padded = round_up(dim, LANES);
        value_padded = round_up(value_dim, LANES);
        code_dim = round_up(dim, CODES);
        means.assign(size_t(count) * padded, 0.0f);
        centres.assign(size_t(count) * padded, 0.0f);
        similarity.resize(count);
        scales.resize(count);
        exact.resize(count);
        finite_values.resize(count);
        finite.resize(count);
        if (call.int8) {
            codes.assign(size_t(count) * K_TILE * code_dim, 0);
            starts.assign(size_t(count) * K_TILE, 0);
        }
#if defined(SPARGE_BF16_DOT)
        if (packs_values(call)) values.resize(size_t(count) * K_TILE / 2 * value_padded);
#endif
        if (call.predictor == CLUSTERED) {
            cluster_means.assign(size_t(count) * cluster_numbers(), 0);
            cluster_sizes.assign(size_t(count) * CLUSTERS, 0.0f);
            cluster_spreads.assign(size_t(count) * CLUSTERS, 0.0f);
        }
    }

    int cluster_numbers() const { return CLUSTERS * padded / CHANNELS_PER_NUMBER; }  // of one tile

    // Products of weights and values in bf16 wherever the scores are quantized or the inputs no finer.
    static bool packs_values(const Call& call) {
#if defined(SPARGE_BF16_DOT)
        return call.int8 || call.dtype == BFLOAT16;
#else
        (void)call;
        return false;
#endif
    }
};

inline int keys_in_tile(const Call& call, int tile) {
    int64_t left = call.k_len - int64_t(tile) * K_TILE;
    return static_cast<int>(left < K_TILE ? left : K_TILE);
}

// Mean of one tile; and whether K is finite there, as similarity 0 or NaN. `buffer` is [padded].
inline void tile_mean(const Call& call, const Rows& k, KeyTiles& keys, int tile, float* buffer) {
    const int count = keys_in_tile(call, tile), padded = keys.padded;
    float* mean = &keys.means[size_t(tile) * padded];
    Ints finite = splat(-1);
    std::memset(mean, 0, sizeof(float) * padded);
    for (int i = 0; i < count; ++i) {
        const float* row = k.get(int64_t(tile) * K_TILE + i, buffer, padded);
        for (int d = 0; d < padded; d += LANES) {
            store(mean + d, load(mean + d) + load(row + d));
            finite &= is_finite(load(row + d));
        }
    }
    for (int d = 0; d < padded; d += LANES) store(mean + d, load(mean + d) / static_cast<float>(count));
    keys.similarity[tile] = !any(~finite) && all_finite(mean, padded) ? 0.0f : NAN;
}

// What each tile is centred by before its self-similarity: the mean of all keys, under causal of the keys so far.
inline void tile_centres(const Call& call, KeyTiles& keys) {
    float total[MAX_DIM] = {};
    int64_t seen = 0;
    for (int tile = 0; tile < keys.count; ++tile) {
        int count = keys_in_tile(call, tile);
        seen += count;
        for (int d = 0; d < keys.dim; ++d) {
            total[d] += keys.means[size_t(tile) * keys.padded + d] * static_cast<float>(count);
            keys.centres[size_t(tile) * keys.padded + d] = total[d] / static_cast<float>(seen);
        }
    }
    if (call.is_causal) return;
    const float* last = &keys.centres[size_t(keys.count - 1) * keys.padded];
    for (int tile = 0; tile + 1 < keys.count; ++tile)
        std::memcpy(&keys.centres[size_t(tile) * keys.padded], last, sizeof(float) * keys.padded);
}

// Adds row / |row| to `total`, both [padded]. A zero row adds nothing; a row that is not finite makes total NaN.
inline void add_unit_row(const float* row, int padded, float* total) {
    Floats squares{};
    for (int d = 0; d < padded; d += LANES) squares += load(row + d) * load(row + d);
    float norm = std::sqrt(sum(squares));
    if (norm == 0) return;
    for (int d = 0; d < padded; d += LANES) store(total + d, load(total + d) + load(row + d) / norm);
}

// |total|^2 / rows^2 of `rows` unit rows that sum to `total`.
inline float similarity_of(const float* total, int padded, int rows) {
    Floats squares{};
    for (int d = 0; d < padded; d += LANES) squares += load(total + d) * load(total + d);
    return sum(squares) / (static_cast<float>(rows) * static_cast<float>(rows));
}

inline float largest_magnitude(const float* row, int padded) {
    Floats largest{};
    for (int d = 0; d < padded; d += LANES) largest = maximum(magnitude(load(row + d)), largest);
    float result = 0;
    for (int lane = 0; lane < LANES; ++lane) result = largest[lane] > result ? largest[lane] : result;
    return result;
}

// row / scale to the nearest integers; `codes` has room for `padded`.
inline void row_codes(const float* row, int padded, float scale, int8_t* codes) {
    for (int d = 0; d < padded; d += LANES) {
        Floats code = load(row + d) / scale;
        code = maximum(code, splat(-LARGEST_CODE));
        store_int8(codes + d, -maximum(-code, splat(-LARGEST_CODE)));
    }
}

// A scale INT8 can work with; `largest` of an all-zero row gives 0, whose codes are zero.
inline bool usable_scale(float largest) {
    float scale = largest / LARGEST_CODE;
    return scale < INF && !(largest > 0 && scale < std::numeric_limits<float>::min());
}

// Self-similarity of one tile, and its INT8 codes after its own mean is taken away. `rows` is scratch,
// [K_TILE][padded].
inline void quantize_tile(const Call& call, const Rows& k, KeyTiles& keys, int tile, float* rows) {
    const int count = keys_in_tile(call, tile), padded = keys.padded;
    const float* mean = &keys.means[size_t(tile) * padded];
    const float* centre = &keys.centres[size_t(tile) * padded];
    float total[MAX_DIM] = {};
    float centred[MAX_DIM];
    float typical = 0, largest = 0;
    for (int i = 0; i < count; ++i) {
        float* line = rows + i * padded;
        const float* row = k.get(int64_t(tile) * K_TILE + i, line, padded);
        for (int d = 0; d < padded; d += LANES) store(centred + d, load(row + d) - load(centre + d));
        add_unit_row(centred, padded, total);
        if (!call.int8) continue;
        for (int d = 0; d < padded; d += LANES) store(line + d, load(row + d) - load(mean + d));
        const float row_largest = largest_magnitude(line, padded);
        typical += row_largest;
        largest = row_largest > largest ? row_largest : largest;
    }
    bool finite = keys.similarity[tile] == 0.0f;
    if (finite && keys.finite_values[tile]) keys.similarity[tile] = similarity_of(total, padded, count);
    else keys.similarity[tile] = NAN;
    if (!call.int8) return;

    bool exact = !finite || !usable_scale(largest) || largest > OUTLIER_RATIO * (typical / static_cast<float>(count));
    keys.exact[tile] = exact;
    keys.scales[tile] = exact ? 0.0f : largest / LARGEST_CODE;
    Code* codes = &keys.codes[size_t(tile) * K_TILE * keys.code_dim];
    int32_t* starts = &keys.starts[size_t(tile) * K_TILE];
    std::fill(codes, codes + size_t(K_TILE) * keys.code_dim, Code(0));
    std::memset(starts, 0, sizeof(int32_t) * K_TILE);
    if (keys.scales[tile] == 0) return;
    int8_t line[MAX_DIM];
    for (int i = 0; i < count; ++i) {
        row_codes(rows + i * padded, padded, keys.scales[tile], line);
        std::copy(line, line + keys.code_dim, codes + i * keys.code_dim);
        for (int d = 0; d < keys.code_dim; ++d) starts[i] -= CODE_OFFSET * line[d];
    }
}

// V of one tile as pairs of bf16, and whether it is finite. What is no number or infinite becomes 0 (worker.h adds its
// effect apart); what bf16 would round up to infinity stays finite. `buffer` is [2][value_padded].
inline void pack_values(const Call& call, const Rows& v, KeyTiles& keys, int tile, float* buffer) {
    const int count = keys_in_tile(call, tile), padded = keys.value_padded;
    Ints finite = splat(-1);
#if defined(SPARGE_BF16_DOT)
    const Floats most = splat(bits_to_float(0x7f7f0000));
    int32_t* pairs = KeyTiles::packs_values(call) ? &keys.values[size_t(tile) * K_TILE / 2 * padded] : nullptr;
    if (pairs) std::memset(pairs, 0, sizeof(int32_t) * K_TILE / 2 * padded);
#endif
    for (int i = 0; i < count; i += 2) {
        const float* even = v.get(int64_t(tile) * K_TILE + i, buffer, padded);
        const bool has_odd = i + 1 < count;
        const float* odd = has_odd ? v.get(int64_t(tile) * K_TILE + i + 1, buffer + padded, padded) : even;
        for (int d = 0; d < padded; d += LANES) {
            Floats values[2] = {load(even + d), has_odd ? load(odd + d) : Floats{}};
            for (Floats& x : values) {
                finite &= is_finite(x);
#if defined(SPARGE_BF16_DOT)
                x = select(is_finite(x), -maximum(-maximum(x, -most), -most), Floats{});
#endif
            }
#if defined(SPARGE_BF16_DOT)
            if (pairs) store(pairs + i / 2 * padded + d, pack_bf16(values[0], values[1]));
#endif
        }
    }
    keys.finite_values[tile] = !any(~finite);
}

}  // namespace sparge
