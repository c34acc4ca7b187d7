// sparge::attention on the CPU: SpargeAttn's two filters over INT8 scores. The specification is reference.py.
//
// Heads are taken a few at a time: K and V are prepared once per kv head, then every tile of 128 queries is one task.
// No result depends on the number of threads.
#include <new>

#include <omp.h>

#include "scores.h"
#include "softmax.h"

namespace sparge {

constexpr int TASKS_PER_THREAD = 32;  // query tiles between two meetings of the threads, if memory allows

// kv heads prepared at a time: enough query tiles to keep the threads busy, not more memory than that takes.
int64_t heads_at_a_time(const Call& call) {
    const int64_t tasks = ceil_div(call.q_len, Q_TILE) * (call.q_heads / call.kv_heads);
    const int64_t wanted = ceil_div(int64_t(call.threads) * TASKS_PER_THREAD, tasks);
    // Prepared heads take 3/8 of what their K and V take in fp32, at most half (where codes are fp32): with half of the
    // heads at a time, a quarter of the whole or less.
    const int64_t affordable = std::max<int64_t>(1, call.batch * call.kv_heads / 2);
    return std::min(affordable, std::max<int64_t>(1, wanted));
}

// Shares of the tiles of the query heads from `first` on, from the counts of their query tiles.
void write_stats(const Call& call, int64_t first, int64_t heads, int query_tiles, const int32_t* counts) {
    for (int64_t head = first; head < first + heads; ++head) {
        int64_t kept = 0, skipped = 0, visible = 0;
        for (int tile = 0; tile < query_tiles; ++tile, counts += 3)
            kept += counts[0], skipped += counts[1], visible += counts[2];
        call.density[head] = visible ? static_cast<float>(kept) / static_cast<float>(visible) : 1.0f;
        call.pv_skipped[head] = kept ? static_cast<float>(skipped) / static_cast<float>(kept) : 0.0f;
    }
}

// The same where the mask is read by bands: of whole batch elements, and of all that share the mask.
int64_t heads_of_a_band(const Call& call) {
    const int64_t all = call.batch * call.kv_heads;
    if (call.mask.strides[0] == 0) return all;
    return std::min(all, ceil_div(heads_at_a_time(call), call.kv_heads) * call.kv_heads);
}

void classify(const Call& call, MaskTiles& mask) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(call.threads) if (mask.rows() > 0)
    for (int64_t row = 0; row < mask.rows(); ++row) {
        SmallNumbers small_numbers;
        mask.classify(row);
    }
}

void attention(const Call& call) {
    const int64_t group = call.q_heads / call.kv_heads, kv_heads = call.batch * call.kv_heads;
    const bool by_bands = MaskBand::pays(call);
    const int64_t together = by_bands ? heads_of_a_band(call) : heads_at_a_time(call);
    // All memory is taken here: an exception must not leave a parallel region.
    MaskTiles mask(call);
    if (by_bands) mask.band = MaskBand(call, together * group);
    const int band = by_bands ? mask.band.query_tiles() : mask.query_tiles;
    std::vector<KeyTiles> keys(together);
    for (KeyTiles& one : keys) one.resize(call);
    std::vector<Worker> workers;
    workers.reserve(call.threads);
    for (int i = 0; i < call.threads; ++i) workers.emplace_back(call);
    std::vector<int32_t> counts(together * group * mask.query_tiles * 3);

    if (!by_bands) classify(call, mask);
    for (int64_t start = 0; start < kv_heads; start += together) {
        const int64_t some = std::min(together, kv_heads - start);
#pragma omp parallel num_threads(call.threads)
        {
            SmallNumbers small_numbers;
            Worker& worker = workers[omp_get_thread_num()];
#pragma omp for schedule(static)
            for (int64_t job = 0; job < some * mask.key_tiles; ++job) {
                const int64_t own = job / mask.key_tiles, at = start + own;
                worker.load_keys(call, keys[own], at / call.kv_heads, at % call.kv_heads, job % mask.key_tiles);
            }
#pragma omp for schedule(static)
            for (int64_t own = 0; own < some; ++own) tile_centres(call, keys[own]);
#pragma omp for schedule(static)
            for (int64_t job = 0; job < some * mask.key_tiles; ++job) {
                const int64_t own = job / mask.key_tiles, at = start + own;
                worker.quantize_keys(call, keys[own], at / call.kv_heads, at % call.kv_heads, job % mask.key_tiles);
            }
            for (int first = 0; first < mask.query_tiles; first += band) {
                const int tiles = std::min(band, mask.query_tiles - first);
                const int64_t batches = by_bands ? std::min(ceil_div(some, call.kv_heads), mask.batches()) : 0;
#pragma omp for schedule(dynamic, 1)
                for (int64_t job = 0; job < batches * tiles * mask.key_tiles; ++job) {
                    const int64_t row = job / mask.key_tiles;
                    const int tile = first + static_cast<int>(row % tiles);
                    mask.take(start / call.kv_heads + row / tiles, tile, job % mask.key_tiles);
                }
#pragma omp for schedule(dynamic, 1)
                for (int64_t job = 0; job < some * group * tiles; ++job) {
                    // Under causal the last query tiles are the longest: they go first.
                    const int64_t head = job / tiles, at = start + head / group;
                    const int tile = first + tiles - 1 - static_cast<int>(job % tiles);
                    worker.run(
                        call, mask, keys[head / group], at / call.kv_heads, at % call.kv_heads * group + head % group,
                        tile, &counts[(head * mask.query_tiles + tile) * 3]);
                }
            }
        }
        write_stats(call, start * group, some * group, mask.query_tiles, counts.data());
    }
}

}  // namespace sparge

// Both return 0, or 1 if memory ran out.
extern "C" int sparge_attention(const sparge::Call* call) {
    try {
        sparge::attention(*call);
        return 0;
    } catch (const std::exception&) {  // bad_alloc, or length_error of a size beyond all memory
        return 1;
    }
}

// For tests: what one head of K and its query tile `tile` are quantized to, and the self-similarities.
// k_codes [k_len][dim], k_scales, k_exact and k_similarity [nK]; q_codes [128][dim], q_scales and q_exact [128].
extern "C" int sparge_quantized(
    const sparge::Call* call, int64_t b, int64_t kv_head, int64_t head, int tile, int8_t* k_codes, float* k_scales,
    uint8_t* k_exact, float* k_similarity, int8_t* q_codes, float* q_scales, uint8_t* q_exact, float* q_similarity) {
    using namespace sparge;
    try {
        KeyTiles keys;
        keys.resize(*call);
        Worker worker(*call);
        for (int i = 0; i < keys.count; ++i) worker.load_keys(*call, keys, b, kv_head, i);
        tile_centres(*call, keys);
        for (int i = 0; i < keys.count; ++i) {
            worker.quantize_keys(*call, keys, b, kv_head, i);
            k_scales[i] = keys.scales[i], k_exact[i] = keys.exact[i], k_similarity[i] = keys.similarity[i];
        }
        for (int64_t i = 0; i < call->k_len; ++i)
            for (int d = 0; d < keys.dim; ++d)
                k_codes[i * keys.dim + d] = static_cast<int8_t>(keys.codes[i * keys.code_dim + d]);
        QueryTile query(*call);
        query.prepare(*call, Rows(call->q, b, head, call->dim, call->dtype), tile);
        *q_similarity = query.similarity;
        for (int i = 0; i < Q_TILE; ++i) {
            q_scales[i] = query.code_factor[i] / query.factor[i], q_exact[i] = query.exact[i] != 0;
            for (int d = 0; d < keys.dim; ++d) q_codes[i * keys.dim + d] = query.code(i, d);
        }
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// For tests: the clusters of one head of K, and what its query tile `tile` makes of them.
// means [nK][CLUSTERS][dim], sizes and spreads [nK][CLUSTERS], weights [nK].
extern "C" int sparge_clustered(
    const sparge::Call* call, int64_t b, int64_t kv_head, int64_t head, int tile, float* means, float* sizes,
    float* spreads, float* weights) {
    using namespace sparge;
    try {
        KeyTiles keys;
        keys.resize(*call);
        Worker worker(*call);
        for (int i = 0; i < keys.count; ++i) worker.load_keys(*call, keys, b, kv_head, i);
        tile_centres(*call, keys);
        for (int i = 0; i < keys.count; ++i) worker.quantize_keys(*call, keys, b, kv_head, i);
        for (int i = 0; i < keys.count; ++i)
            for (int c = 0; c < CLUSTERS; ++c)
                for (int d = 0; d < keys.dim; ++d) *means++ = cluster_mean(keys, i, c, d);
        std::copy(keys.cluster_sizes.begin(), keys.cluster_sizes.end(), sizes);
        std::copy(keys.cluster_spreads.begin(), keys.cluster_spreads.end(), spreads);
        MaskTiles mask(*call);
        for (int64_t row = 0; row < mask.rows(); ++row) mask.classify(row);
        worker.weights(*call, mask, keys, b, head, tile, weights);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
