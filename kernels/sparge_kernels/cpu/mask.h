// attn_mask in tiles: which tiles it hides, which it leaves alone, and its values where they matter (masks.py).
#pragma once

#include <vector>

#include "mask_band.h"

namespace sparge {

constexpr float MASK_SPREAD = 1.0f;  // masks.py
constexpr int64_t ROWS_AT_ONCE = 16;  // of a tile between two looks at whether it is sorted already

enum MaskKind : uint8_t {
    HIDDEN = 0,   // -inf everywhere: the tile is never visited
    OPEN = 1,     // 0 everywhere: no need to look
    BIASED = 2,   // numbers that differ little: added to the scores, their mean to the prediction
    PARTIAL = 3,  // anything else: kept, exact
};

struct MaskTiles {
    const Call& call;
    const int query_tiles, key_tiles;
    std::vector<uint8_t> kinds;  // [batch or 1][heads or 1][nQ][nK]
    std::vector<float> means;    // the same, where BIASED
    MaskBand band;               // of masks that are read from there

    explicit MaskTiles(const Call& call)
        : call(call), query_tiles(static_cast<int>(ceil_div(call.q_len, Q_TILE))),
          key_tiles(static_cast<int>(ceil_div(call.k_len, K_TILE))) {
        if (call.mask.data == nullptr) return;
        kinds.resize(rows() * key_tiles);
        if (call.mask_dtype != BOOL) means.resize(rows() * key_tiles);
    }

    int64_t batches() const { return call.mask.strides[0] == 0 ? 1 : call.batch; }
    int64_t heads() const { return call.mask.strides[1] == 0 ? 1 : call.q_heads; }
    int64_t rows() const { return call.mask.data == nullptr ? 0 : batches() * heads() * query_tiles; }

    // First entry of one head's query tile in `kinds` and `means`.
    int64_t at(int64_t b, int64_t h, int query_tile) const {
        return (((batches() == 1 ? 0 : b) * heads() + (heads() == 1 ? 0 : h)) * query_tiles + query_tile) * key_tiles;
    }

    // `count` numbers of one row of a tile of the mask: 0 and -inf for a bool.
    void read(int64_t b, int64_t h, int64_t query, int64_t key, int count, float* row) const {
        const int64_t* strides = call.mask.strides;
        if (band.numbers()) return read_row(band.numbers(), band.at(b, h, query, key), 1, count, call.mask_dtype, row);
        const int64_t at = b * strides[0] + h * strides[1] + query * strides[2] + key * strides[3];
        read_row(call.mask.data, at, strides[3], count, call.mask_dtype, row);
    }

    // Classifies all K tiles of one row of tiles, 0 <= row < rows().
    void classify(int64_t row) {
        const int64_t h = row / query_tiles % heads(), b = row / query_tiles / heads();
        for (int tile = 0; tile < key_tiles; ++tile) classify(b, h, static_cast<int>(row % query_tiles), tile);
    }

    // Takes one tile of all heads into the band and classifies it.
    void take(int64_t b, int query_tile, int tile) {
        band.copy(call, b, query_tile, tile);
        for (int64_t h = 0; h < heads(); ++h) classify(b, h, query_tile, tile);
    }

private:
    struct Tile {
        int64_t b, h, first, last, key;  // last: after the last query
        int count;
    };

    void classify(int64_t b, int64_t h, int query_tile, int tile) {
        const int64_t first = int64_t(query_tile) * Q_TILE, key = int64_t(tile) * K_TILE;
        // A row that is the same for every query is read once.
        const int64_t last = call.mask.strides[2] == 0 ? first + 1 : std::min(first + Q_TILE, call.q_len);
        const Tile one{b, h, first, last, key, static_cast<int>(std::min<int64_t>(K_TILE, call.k_len - key))};
        const int64_t entry = at(b, h, query_tile) + tile;
        kinds[entry] = kind(one);
        if (kinds[entry] == BIASED) means[entry] = mean(one);
    }

    MaskKind kind(const Tile& tile) const {
        Floats largest = splat(-INF), smallest = splat(INF);
        Ints is_number = splat(-1);
        float line[K_TILE], most = -INF, least = INF;
        for (int64_t query = tile.first; query < tile.last;) {
            for (const int64_t stop = std::min(query + ROWS_AT_ONCE, tile.last); query < stop; ++query) {
                read(tile.b, tile.h, query, tile.key, tile.count, line);
                std::fill(line + tile.count, line + K_TILE, line[0]);
                for (int i = 0; i < K_TILE; i += LANES) {
                    const Floats x = load(line + i);
                    is_number &= x == x;
                    largest = maximum(x, largest), smallest = -maximum(-x, -smallest);
                }
            }
            for (int lane = 0; lane < LANES; ++lane)
                most = std::max(most, largest[lane]), least = std::min(least, smallest[lane]);
            // What is PARTIAL by some of its rows is by all.
            if (any(~is_number) || most == INF || most - least > MASK_SPREAD) return PARTIAL;
        }
        if (most == -INF) return HIDDEN;
        if (most == 0 && least == 0) return OPEN;
        return most - least <= MASK_SPREAD ? BIASED : PARTIAL;
    }

    float mean(const Tile& tile) const {
        typedef float Part __attribute__((vector_size(8 * sizeof(float)), aligned(alignof(float)), may_alias));
        typedef double Totals __attribute__((vector_size(8 * sizeof(double))));  // in every build: one order of adding
        Totals totals{};
        float line[K_TILE] = {};
        for (int64_t query = tile.first; query < tile.last; ++query) {
            read(tile.b, tile.h, query, tile.key, tile.count, line);
            for (int i = 0; i < K_TILE; i += 8)
                totals += __builtin_convertvector(*reinterpret_cast<const Part*>(line + i), Totals);
        }
        double total = 0;
        for (int i = 0; i < 8; ++i) total += totals[i];
        return static_cast<float>(total / double((tile.last - tile.first) * tile.count));
    }
};

}  // namespace sparge
