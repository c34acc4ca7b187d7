// One thread's work on a tile of 128 queries: stage 1 selects its K tiles, an online softmax runs over them (stage 2).
// Each query is one vector lane: what a lane computes from the tiles it keeps depends on no other query.
// The scores are in scores.h, softmax and output in softmax.h.
#pragma once

#include "clusters.h"
#include "selection.h"

namespace sparge {

// Weights are exp2(score - base). base stays this far above the running maximum when it is raised, so it moves rarely.
constexpr float HEADROOM = 8.0f;
constexpr int OFFSETS = 16;                // K tiles whose q . mean is computed at a time

struct Task {  // what one query tile of one head works on
    const Call& call;
    const KeyTiles& keys;
    const MaskTiles& mask;
    Rows k, v;
    int64_t b, h, first_query;
    float skip_below;  // stage 2, in bits

    // The first group with a query that sees any of the tile.
    int first_group(int tile) const {
        const int64_t before = call.is_causal ? int64_t(tile) * K_TILE - first_query : 0;
        return before > 0 ? static_cast<int>(before) / GROUP * GROUP : 0;
    }
};

class Worker {
public:
    explicit Worker(const Call& call)
        : query_(call), selection_(call, static_cast<int>(ceil_div(call.k_len, K_TILE))), weights_of_tiles_(call),
          scores_(K_TILE * Q_TILE), exact_scores_(K_TILE * GROUP), weights_(K_TILE * Q_TILE),
          output_(round_up(call.value_dim, LANES) * Q_TILE),
          lines_(std::max({round_up(call.dim, LANES), round_up(call.value_dim, LANES), K_TILE}) * Q_TILE),
          offsets_(OFFSETS * Q_TILE), means_(OFFSETS * round_up(call.dim, LANES)), code_factor_(Q_TILE),
          running_(Q_TILE), base_(Q_TILE), mass_(Q_TILE), tile_max_(Q_TILE), decay_(Q_TILE) {}

    // K and V of one tile, in the two passes of keys.h.
    void load_keys(const Call& call, KeyTiles& keys, int64_t b, int64_t h, int tile) {
        tile_mean(call, Rows(call.k, b, h, call.dim, call.dtype), keys, tile, lines_);
        pack_values(call, Rows(call.v, b, h, call.value_dim, call.dtype), keys, tile, lines_);
        keys.finite[tile] = keys.similarity[tile] == 0.0f && keys.finite_values[tile];
        if (call.predictor == CLUSTERED && keys.finite[tile])
            cluster_tile(call, Rows(call.k, b, h, call.dim, call.dtype), keys, tile, lines_);
    }
    void quantize_keys(const Call& call, KeyTiles& keys, int64_t b, int64_t h, int tile) {
        quantize_tile(call, Rows(call.k, b, h, call.dim, call.dtype), keys, tile, lines_);
    }

    // One query tile of head h; counts kept, skipped and visible K tiles.
    void run(
        const Call& call, const MaskTiles& mask, const KeyTiles& keys, int64_t b, int64_t h, int tile, int32_t* counts);

    // For tests: ln of the weights of the K tiles of one query tile, [nK]; -inf where a tile has no part.
    void weights(
        const Call& call, const MaskTiles& mask, const KeyTiles& keys, int64_t b, int64_t h, int tile, float* out);

private:
    QueryTile query_;
    Selection selection_;
    TileWeights weights_of_tiles_;
    Aligned<float> scores_;        // [groups][K_TILE][GROUP], bits
    Aligned<float> exact_scores_;  // [K_TILE][GROUP]
    Aligned<float> weights_;       // pairs of keys in bf16, [K_TILE / 2][GROUP] at each group; in fp32: scores_
    Aligned<float> output_;        // [value_dim][Q_TILE]
    Aligned<float> lines_;         // rows of inputs, mask or output on their way
    Aligned<float> offsets_;       // [OFFSETS][Q_TILE]: q . mean in bits
    Aligned<float> means_;         // [OFFSETS][padded]
    Aligned<float> code_factor_;   // [GROUP]: with the K tile's scale
    Aligned<float> running_, base_, mass_, tile_max_, decay_;  // [Q_TILE]

    void sort_tiles(const Task& task, Visible seen);
    void choose_tiles(const Task& task);
    const float* weigh_tiles(const Task& task);
    // scores.h
    void mean_offsets(const KeyTiles& keys, const Selection::Kept* tiles, int count);
    void score_tile(const Task& task, Selection::Kept kept, const float* offset, int group);
    void exact_group(const Task& task, int tile, int group, float* out, float* maxima);
    void blend_exact_rows(const Task& task, int tile, int group);
    void add_mask(const Task& task, int tile, int group);
    void hide_future(const Task& task, int tile, int group);
    // softmax.h
    bool weigh(int group, bool keep, bool pack, float* gap);
    void add_values(const Task& task, int tile, int first_group, const bool* rescale);
    void add_non_finite(const Task& task, int tile);
    void write(const Task& task);
};

inline Task task_of(const Call& call, const MaskTiles& mask, const KeyTiles& keys, int64_t b, int64_t h, int tile) {
    const int64_t kv_head = h / (call.q_heads / call.kv_heads);
    return {
        call, keys, mask, Rows(call.k, b, kv_head, call.dim, call.dtype),
        Rows(call.v, b, kv_head, call.value_dim, call.dtype), b, h, int64_t(tile) * Q_TILE,
        call.thresholds[h].skip_below * LOG2_E};
}

inline void Worker::sort_tiles(const Task& task, Visible seen) {
    const MaskTiles& mask = task.mask;
    const bool has_mask = task.call.mask.data != nullptr, has_means = has_mask && !mask.means.empty();
    const int64_t at = has_mask ? mask.at(task.b, task.h, static_cast<int>(task.first_query / Q_TILE)) : 0;
    selection_.sort(
        task.call, query_, task.keys, task.call.thresholds[task.h], seen, has_mask ? &mask.kinds[at] : nullptr,
        has_means ? &mask.means[at] : nullptr);
}

// Stage 1.
inline void Worker::choose_tiles(const Task& task) {
    const Call& call = task.call;
    const Thresholds& t = call.thresholds[task.h];
    if (!selection_.has_choice(t)) return selection_.keep_all();
    if (call.predictor == SPARGE) return selection_.keep_largest(call, query_, task.keys, t);
    selection_.drop_smallest(weigh_tiles(task), t);
}

// ln of the weights of the tiles with a part in the softmax, [nK].
inline const float* Worker::weigh_tiles(const Task& task) {
    weights_of_tiles_.start(task.call, query_, task.keys.padded);
    return weights_of_tiles_.run(query_, task.keys, selection_.parts);
}

inline void Worker::run(
    const Call& call, const MaskTiles& mask, const KeyTiles& keys, int64_t b, int64_t h, int tile, int32_t* counts) {
    const Task task = task_of(call, mask, keys, b, h, tile);
    query_.prepare(call, Rows(call.q, b, h, call.dim, call.dtype), tile);
    const Visible seen(call, tile, query_.rows, keys.count);
    sort_tiles(task, seen);
    choose_tiles(task);
    const std::vector<Selection::Kept>& tiles = selection_.tiles;
    if (call.kept) {
        uint8_t* map = call.kept + ((b * call.q_heads + h) * mask.query_tiles + tile) * keys.count;
        std::memset(map, 0, keys.count);
        for (Selection::Kept kept : tiles) map[kept.tile] = 1;
    }

    for (int i = 0; i < Q_TILE; ++i) running_[i] = base_[i] = -INF, mass_[i] = 0;
    std::memset(output_, 0, sizeof(float) * Q_TILE * round_up(call.value_dim, LANES));
    const bool pack = KeyTiles::packs_values(call);
    int32_t skipped = 0;
    for (size_t at = 0; at < tiles.size(); ++at) {
        if (call.int8 && at % OFFSETS == 0)
            mean_offsets(keys, &tiles[at], static_cast<int>(std::min<size_t>(OFFSETS, tiles.size() - at)));
        const Selection::Kept kept = tiles[at];
        const bool finite = keys.finite_values[kept.tile];
        const int first_group = task.first_group(kept.tile);
        float gap = -INF;
        bool rescale[Q_TILE / GROUP];
        for (int group = first_group; group < Q_TILE; group += GROUP) {
            score_tile(task, kept, offsets_ + at % OFFSETS * Q_TILE, group);
            rescale[group / GROUP] = weigh(group, !finite, pack, &gap);
        }
        if (kept.kind != PARTIAL && finite && gap < task.skip_below) {
            ++skipped;  // no maximum was raised: the output need not decay
            continue;
        }
        add_values(task, kept.tile, first_group, rescale);
        if (!finite) add_non_finite(task, kept.tile);
    }
    write(task);
    counts[0] = static_cast<int32_t>(tiles.size());
    counts[1] = skipped;
    counts[2] = selection_.visible;
}

inline void Worker::weights(
    const Call& call, const MaskTiles& mask, const KeyTiles& keys, int64_t b, int64_t h, int tile, float* out) {
    const Task task = task_of(call, mask, keys, b, h, tile);
    query_.prepare(call, Rows(call.q, b, h, call.dim, call.dtype), tile);
    const Visible seen(call, tile, query_.rows, keys.count);
    sort_tiles(task, seen);
    const float* weights = weigh_tiles(task);
    std::fill(out, out + keys.count, -INF);
    for (Part part : selection_.parts) out[part.tile] = weights[part.tile];
}

}  // namespace sparge
