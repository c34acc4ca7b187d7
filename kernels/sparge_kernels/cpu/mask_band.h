// Masks whose keys lie apart in memory, such as a bias [query, key, head] seen as [head, query, key].
//
// Read in place, every head would fetch the cache lines that all of them share. So some rows of tiles, a band, are
// copied at a time, every tile of all heads at once, to where keys lie together.
#pragma once

#include <memory>
#include <new>

#include "inputs.h"

namespace sparge {

constexpr int BAND_TASKS_PER_THREAD = 16;  // query tiles of one head between two meetings of the threads
constexpr int KEYS_AT_ONCE = 8;            // copied of each row in turn

class MaskBand {
public:
    static bool pays(const Call& call) { return call.mask.data && call.mask.strides[3] > 1; }

    MaskBand() = default;
    // `together`: query heads worked on at a time, of whole batch elements; of all if they share the mask.
    MaskBand(const Call& call, int64_t together)
        : query_tiles_(tiles(call, together)), key_tiles_(static_cast<int>(ceil_div(call.k_len, K_TILE))),
          rows_(call.mask.strides[2] == 0 ? 1 : static_cast<int>(std::min<int64_t>(Q_TILE, call.q_len))),
          batches_(call.mask.strides[0] == 0 ? 1 : together / call.q_heads),
          heads_(call.mask.strides[1] == 0 ? 1 : call.q_heads),
          numbers_(allocate(batches_ * heads_ * query_tiles_ * key_tiles_ * rows_ * K_TILE * size_of_one(call))) {}

    // Query tiles that the band holds; it starts at a multiple of them.
    int query_tiles() const { return query_tiles_; }
    const void* numbers() const { return numbers_.get(); }

    // Where the number of (query, key) lies; its row goes on to the end of the key's tile.
    int64_t at(int64_t b, int64_t h, int64_t query, int64_t key) const {
        const int64_t row = rows_ == 1 ? 0 : query % Q_TILE;
        return (tile_at(b, h, query / Q_TILE, key / K_TILE) * rows_ + row) * K_TILE + key % K_TILE;
    }

    // Copies one tile of all heads.
    void copy(const Call& call, int64_t b, int query_tile, int tile) {
        if (call.mask_dtype == FLOAT32) return copy_as<uint32_t>(call, b, query_tile, tile);
        if (call.mask_dtype == BOOL) return copy_as<uint8_t>(call, b, query_tile, tile);
        copy_as<uint16_t>(call, b, query_tile, tile);
    }

private:
    struct Dimension {
        int64_t size, source_stride, target_stride;
    };
    struct Free {
        void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
    };

    int query_tiles_ = 0, key_tiles_ = 0, rows_ = 0;
    int64_t batches_ = 0, heads_ = 0;
    std::unique_ptr<void, Free> numbers_;  // [batches][heads][query tiles][nK][rows][K_TILE], as the mask has them

    static int tiles(const Call& call, int64_t together) {
        const int64_t enough = ceil_div(int64_t(call.threads) * BAND_TASKS_PER_THREAD, together);
        return static_cast<int>(std::min(enough, ceil_div(call.q_len, Q_TILE)));
    }
    static int64_t size_of_one(const Call& call) {
        return call.mask_dtype == FLOAT32 ? 4 : call.mask_dtype == BOOL ? 1 : 2;
    }
    // Not cleared: the threads that copy are the first to touch its pages.
    static void* allocate(int64_t bytes) { return ::operator new(bytes, std::align_val_t(64)); }

    int64_t tile_at(int64_t b, int64_t h, int64_t query_tile, int64_t tile) const {
        const int64_t head = b % batches_ * heads_ + (heads_ == 1 ? 0 : h);
        return (head * query_tiles_ + query_tile % query_tiles_) * key_tiles_ + tile;
    }

    template <class T>
    void copy_as(const Call& call, int64_t b, int query_tile, int tile) {
        const int64_t* strides = call.mask.strides;
        const int64_t first = int64_t(query_tile) * Q_TILE, key = int64_t(tile) * K_TILE;
        const int64_t count = std::min<int64_t>(K_TILE, call.k_len - key);
        const T* source =
            static_cast<const T*>(call.mask.data) + b * strides[0] + first * strides[2] + key * strides[3];
        T* target = static_cast<T*>(numbers_.get()) + at(b, 0, first, key);
        Dimension inner{heads_, strides[1], int64_t(query_tiles_) * key_tiles_ * rows_ * K_TILE};
        Dimension outer{std::min<int64_t>(rows_, call.q_len - first), strides[2], K_TILE};
        if (heads_ == 1 || strides[2] < strides[1]) std::swap(inner, outer);  // what lies closest is copied together
        for (int64_t i = 0; i < outer.size; ++i)
            for (int64_t done = 0; done < count; done += KEYS_AT_ONCE) {
                const T* from = source + i * outer.source_stride + done * strides[3];
                T* to = target + i * outer.target_stride + done;
                if (count - done >= KEYS_AT_ONCE) copy_block<KEYS_AT_ONCE>(from, strides[3], to, inner);
                else
                    for (int64_t one = 0; one < count - done; ++one)
                        copy_block<1>(from + one * strides[3], strides[3], to + one, inner);
            }
    }

    template <int KEYS, class T>
    static void copy_block(const T* source, int64_t key_stride, T* target, Dimension inner) {
        for (int64_t j = 0; j < inner.size; ++j)
            for (int key = 0; key < KEYS; ++key)
                target[j * inner.target_stride + key] = source[j * inner.source_stride + key * key_stride];
    }
};

}  // namespace sparge
