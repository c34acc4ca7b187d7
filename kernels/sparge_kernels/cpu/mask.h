// attn_mask in tiles: which tiles it hides, which it leaves alone, and its values where they matter (masks.py).
#pragma once

#include <vector>

#include "inputs.h"

namespace sparge {

constexpr float MASK_SPREAD = 1.0f;  // masks.py

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

    // `count` numbers of one row of the mask: 0 and -inf for a bool.
    void read(int64_t b, int64_t h, int64_t query, int64_t key, int count, float* row) const {
        const int64_t* strides = call.mask.strides;
        const int64_t at = b * strides[0] + h * strides[1] + query * strides[2] + key * strides[3];
        if (call.mask_dtype != BOOL) return read_row(call.mask.data, at, strides[3], count, call.mask_dtype, row);
        const uint8_t* source = static_cast<const uint8_t*>(call.mask.data) + at;
        for (int i = 0; i < count; ++i) row[i] = source[i * strides[3]] ? 0.0f : -INF;
    }

    // Classifies all K tiles of one row of tiles, 0 <= row < rows().
    void classify(int64_t row) {
        const int query_tile = static_cast<int>(row % query_tiles);
        const int64_t h = row / query_tiles % heads(), b = row / query_tiles / heads();
        const int64_t first = int64_t(query_tile) * Q_TILE;
        // A row that is the same for every query is read once.
        const int64_t last = call.mask.strides[2] == 0 ? first + 1 : std::min(first + Q_TILE, call.q_len);
        for (int tile = 0; tile < key_tiles; ++tile) {
            const int count = static_cast<int>(std::min<int64_t>(K_TILE, call.k_len - int64_t(tile) * K_TILE));
            float line[K_TILE], largest = -INF, smallest = INF;
            double total = 0;
            bool is_number = true;
            for (int64_t query = first; query < last; ++query) {
                read(b, h, query, int64_t(tile) * K_TILE, count, line);
                for (int key = 0; key < count; ++key) {
                    is_number &= line[key] == line[key];
                    largest = std::max(largest, line[key]);
                    smallest = std::min(smallest, line[key]);
                    total += line[key];
                }
            }
            const int64_t entry = row * key_tiles + tile;
            if (is_number && largest == -INF) kinds[entry] = HIDDEN;
            else if (is_number && largest == 0 && smallest == 0) kinds[entry] = OPEN;
            else if (is_number && largest < INF && largest - smallest <= MASK_SPREAD) kinds[entry] = BIASED;
            else kinds[entry] = PARTIAL;
            if (kinds[entry] == BIASED) means[entry] = static_cast<float>(total / double((last - first) * count));
        }
    }
};

}  // namespace sparge
