// Scores of one K tile and the queries of a tile: INT8 or exact, masked, causal; in bits.
#pragma once

#include "worker.h"

namespace sparge {

// offsets_[i][query] = scale * q . mean of tile i, in bits: what centring took from the scores.
inline void Worker::mean_offsets(const KeyTiles& keys, const Selection::Kept* tiles, int count) {
    for (int i = 0; i < count; ++i)
        std::memcpy(
            means_ + i * keys.padded, &keys.means[size_t(tiles[i].tile) * keys.padded], sizeof(float) * keys.padded);
    for (int group = 0; group < Q_TILE; group += GROUP) {
        score_group<DotFloat>(
            {means_, keys.padded, 1}, query_.wide + group, keys.dim, nullptr, query_.factor + group,
            query_.offset + group, count, scores_, tile_max_);
        for (int i = 0; i < count; ++i)
            std::memcpy(offsets_ + i * Q_TILE + group, scores_ + i * GROUP, sizeof(float) * GROUP);
    }
}

inline void Worker::exact_group(const Task& task, int tile, int group, float* out, float* maxima) {
    ptrdiff_t stride;
    int count = keys_in_tile(task.call, tile);
    const float* rows = task.k.get_many(int64_t(tile) * K_TILE, count, lines_, &stride);
    score_group<DotFloat>(
        {rows, stride, 1}, query_.wide + group, task.keys.dim, nullptr, query_.factor + group, query_.offset + group,
        count, out, maxima);
}

// Scores of one K tile and the GROUP queries from `group` on, in bits, -inf where a key is not seen; and their maxima.
inline void Worker::score_tile(const Task& task, Selection::Kept kept, const float* offset, int group) {
    const KeyTiles& keys = task.keys;
    const int tile = kept.tile, count = keys_in_tile(task.call, tile);
    float* scores = scores_ + group * K_TILE;
    float* maxima = tile_max_ + group;
    for (int i = 0; i < GROUP; i += LANES) store(maxima + i, splat(-INF));
    for (int i = count * GROUP; i < K_TILE * GROUP; i += LANES) store(scores + i, splat(-INF));
    if (!task.call.int8 || kept.kind == PARTIAL || keys.exact[tile]) {
        exact_group(task, tile, group, scores, maxima);
    } else {
        for (int i = 0; i < GROUP; i += LANES)
            store(code_factor_ + i, load(query_.code_factor + group + i) * keys.scales[tile]);
        using Granule = CodeDot::Granule;
        const Code* codes = &keys.codes[size_t(tile) * K_TILE * keys.code_dim];
        const int granules = keys.code_dim / CODES;
        score_group<CodeDot>(
            {reinterpret_cast<const Granule*>(codes), granules, 1},
            reinterpret_cast<const Granule*>(query_.codes + group), granules, &keys.starts[size_t(tile) * K_TILE],
            code_factor_, offset + group, count, scores, maxima);
        if (query_.any_exact) blend_exact_rows(task, tile, group);
    }
    if (task.call.mask.data && kept.kind != OPEN) add_mask(task, tile, group);
    if (task.call.is_causal && kept.kind == PARTIAL) hide_future(task, tile, group);
}

// Rows that INT8 cannot hold get the exact product; the others keep theirs to the bit.
inline void Worker::blend_exact_rows(const Task& task, int tile, int group) {
    float* scores = scores_ + group * K_TILE;
    float* maxima = tile_max_ + group;
    float ignored[GROUP] = {};
    exact_group(task, tile, group, exact_scores_, ignored);
    for (int i = 0; i < GROUP; i += LANES) {
        const Ints exact = *reinterpret_cast<const Ints*>(query_.exact + group + i);
        Floats largest = splat(-INF);
        for (int at = i; at < keys_in_tile(task.call, tile) * GROUP; at += GROUP) {
            store(scores + at, select(exact, load(exact_scores_ + at), load(scores + at)));
            largest = maximum(load(scores + at), largest);
        }
        store(maxima + i, largest);
    }
}

inline void Worker::add_mask(const Task& task, int tile, int group) {
    const int count = keys_in_tile(task.call, tile), rows = std::min(GROUP, query_.rows - group);
    float* scores = scores_ + group * K_TILE;
    float* numbers = lines_;                      // [GROUP][K_TILE]
    float* transposed = lines_ + GROUP * K_TILE;  // [K_TILE][GROUP]
    std::memset(numbers, 0, sizeof(float) * GROUP * K_TILE);
    for (int i = 0; i < rows; ++i)
        task.mask.read(
            task.b, task.h, task.first_query + group + i, int64_t(tile) * K_TILE, count, numbers + i * K_TILE);
    transpose(numbers, GROUP, K_TILE, K_TILE, transposed, GROUP);
    for (int i = 0; i < GROUP; i += LANES) {
        Floats largest = splat(-INF);
        for (int at = i; at < count * GROUP; at += GROUP) {
            store(scores + at, to_bits(load(transposed + at)) + load(scores + at));
            largest = maximum(load(scores + at), largest);
        }
        store(tile_max_ + group + i, largest);
    }
}

inline void Worker::hide_future(const Task& task, int tile, int group) {
    float* scores = scores_ + group * K_TILE;
    for (int i = 0; i < GROUP; i += LANES) {
        Ints last_seen;  // of the tile's keys
        for (int lane = 0; lane < LANES; ++lane)
            last_seen[lane] = static_cast<int32_t>(task.first_query + group + i + lane - int64_t(tile) * K_TILE);
        Floats largest = splat(-INF);
        for (int key = 0; key < K_TILE; ++key) {
            float* at = scores + key * GROUP + i;
            store(at, select(splat(key) <= last_seen, load(at), splat(-INF)));
            largest = maximum(load(at), largest);
        }
        store(tile_max_ + group + i, largest);
    }
}

}  // namespace sparge
