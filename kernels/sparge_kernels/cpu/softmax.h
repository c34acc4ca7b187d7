// Stage 2: the running softmax of a query tile, its product with V, and its output.
#pragma once

#include "worker.h"

namespace sparge {

// Scores to weights for one group: advances the running softmax; true if the output must decay before it grows.
// `gap` is raised to the largest of tile maximum - running maximum. `keep`: leave the fp32 weights in scores_.
inline bool Worker::weigh(int group, [[maybe_unused]] bool keep, bool pack, float* gap) {
    float* scores = scores_ + group * K_TILE;
    Floats largest_gap = splat(-INF);
    Ints raised_any{};
    for (int i = 0; i < GROUP; i += LANES) {
        float *running = running_ + group + i, *base = base_ + group + i;
        Floats tile_max = load(tile_max_ + group + i), old_base = load(base);
        Floats new_max = maximum(load(running), tile_max);
        largest_gap = maximum(tile_max - new_max, largest_gap);
        Ints raised = new_max > old_base;
        Floats new_base = select(raised, new_max + HEADROOM, old_base);
        Floats decay = select(raised, exp2<true>(old_base - new_base), splat(1.0f));
        store(running, new_max);
        store(base, new_base);
        store(decay_ + group + i, decay);
        raised_any |= raised;

        Floats shift = select(new_base == -INF, splat(0.0f), new_base);
        Floats mass = load(mass_ + group + i) * decay;
        float* column = scores + i;
#if defined(SPARGE_BF16_DOT)
        if (pack) {
            int32_t* pairs = reinterpret_cast<int32_t*>(weights_ + group * K_TILE);
            for (int key = 0; key < K_TILE; key += 2) {
                Floats even = exp2<false>(load(column + key * GROUP) - shift);
                Floats odd = exp2<false>(load(column + (key + 1) * GROUP) - shift);
                mass += even + odd;
                if (keep) store(column + key * GROUP, even), store(column + (key + 1) * GROUP, odd);
                store(pairs + key / 2 * GROUP + i, pack_bf16(even, odd));
            }
        }
#endif
        if (!pack)
            for (int key = 0; key < K_TILE; ++key) {
                Floats weight = exp2<true>(load(column + key * GROUP) - shift);
                mass += weight;
                store(column + key * GROUP, weight);
            }
        store(mass_ + group + i, mass);
    }
    for (int lane = 0; lane < LANES; ++lane) *gap = largest_gap[lane] > *gap ? largest_gap[lane] : *gap;
    return any(raised_any);
}

inline void Worker::add_values(const Task& task, int tile, int first_group, const bool* rescale) {
    const KeyTiles& keys = task.keys;
    const int dim = keys.value_dim;
#if defined(SPARGE_BF16_DOT)
    if (KeyTiles::packs_values(task.call)) {
        const int32_t* values = &keys.values[size_t(tile) * K_TILE / 2 * keys.value_padded];
        for (int group = first_group; group < Q_TILE; group += GROUP)
            value_group<DotBFloat16>(
                {values, 1, keys.value_padded}, reinterpret_cast<const Granule*>(weights_ + group * K_TILE), K_TILE / 2,
                rescale[group / GROUP] ? decay_ + group : nullptr, dim, output_ + group);
        return;
    }
#endif
    // A copy, even of what is fp32: heads of rows that lie far apart would meet in a few sets of the cache.
    const int count = keys_in_tile(task.call, tile), pitch = ceil_div(dim, 16) * 16 | 16;
    for (int key = 0; key < count; ++key) task.v.get(int64_t(tile) * K_TILE + key, lines_ + key * pitch);
    if (!keys.finite_values[tile])
        for (int i = 0; i < count * pitch; ++i)
            if (!(std::fabs(lines_[i]) < INF)) lines_[i] = 0;
    for (int group = first_group; group < Q_TILE; group += GROUP)
        value_group<DotFloat>(
            {lines_, 1, pitch}, scores_ + group * K_TILE, count, rescale[group / GROUP] ? decay_ + group : nullptr,
            dim, output_ + group);
}

// What the numbers of V that are not finite add, each to the queries that see its key only (spread_non_finite).
inline void Worker::add_non_finite(const Task& task, int tile) {
    const int count = keys_in_tile(task.call, tile), dim = task.keys.value_dim;
    float row[MAX_DIM];
    for (int key = 0; key < count; ++key) {
        task.v.get(int64_t(tile) * K_TILE + key, row);
        for (int d = 0; d < dim; ++d) {
            if (std::fabs(row[d]) < INF) continue;
            const int64_t hidden = task.call.is_causal ? int64_t(tile) * K_TILE + key - task.first_query : 0;
            for (int i = 0; i < Q_TILE; i += LANES) {
                if (i + LANES <= hidden) continue;
                Floats weight = load(scores_ + i / GROUP * GROUP * K_TILE + key * GROUP + i % GROUP);
                Floats effect = select(weight != 0.0f, splat(row[d]), splat(NAN));
                for (int lane = 0; i + lane < hidden && lane < LANES; ++lane) effect[lane] = 0;
                store(output_ + d * Q_TILE + i, load(output_ + d * Q_TILE + i) + effect);
            }
        }
    }
}

inline void Worker::write(const Task& task) {
    const Call& call = task.call;
    const int dim = static_cast<int>(call.value_dim), padded = round_up(dim, LANES);
    for (int i = 0; i < Q_TILE; i += LANES) {
        Floats mass = load(mass_ + i);
        mass = select(mass == 0.0f, splat(1.0f), mass);
        for (int d = 0; d < dim; ++d) store(output_ + d * Q_TILE + i, load(output_ + d * Q_TILE + i) / mass);
    }
    transpose(output_, padded, Q_TILE, Q_TILE, lines_, padded);
    const int64_t* strides = call.out.strides;
    const int64_t start = task.b * strides[0] + task.h * strides[1];
    for (int i = 0; i < query_.rows; ++i)
        write_row(
            call.out.data, start + (task.first_query + i) * strides[2], strides[3], dim, call.dtype,
            lines_ + i * padded);
}

}  // namespace sparge
