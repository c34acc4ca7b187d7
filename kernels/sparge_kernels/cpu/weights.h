// Predictor "clusters", Q side: the largest share of its softmax mass that any row of a query tile gives each K tile.
// The specification is clusters.tile_weights. All logarithms are in bits.
#pragma once

#include "queries.h"

namespace sparge {

constexpr int TOGETHER = 16;  // K tiles whose clusters are scored at a time
constexpr float LN_2 = 0.6931471805599453f;

struct Part {  // a K tile with a part in the softmax
    int32_t tile;
    float bias;  // the mean of the mask, nats
};

// Nats to bits. The largest numbers, with which masks hide keys too, stay numbers: only -inf is nothing at all.
inline Floats to_bits(Floats nats) {
    const Floats most = splat(std::numeric_limits<float>::max());
    const Floats bits = nats * LOG2_E;
    return select(is_finite(nats), -maximum(-maximum(bits, -most), -most), bits);
}

class TileWeights {
public:
    explicit TileWeights(const Call& call)
        : TileWeights(call.predictor == CLUSTERED, static_cast<int>(ceil_div(call.k_len, K_TILE)),
                      round_up(call.dim, LANES)) {}

    // Of one query tile: its rows' masses are 0.
    void start(const Call& call, const QueryTile& query, int padded) {
        rows_ = query.rows;
        const float rise = 0.5f * call.scale * call.scale * LOG2_E;
        for (int i = 0; i < Q_TILE; i += LANES) {
            Floats squares{};
            for (int d = 0; d < padded; ++d) {
                const Floats channel = load(query.wide + d * Q_PITCH + i);
                squares += channel * channel;
            }
            store(rise_ + i, squares * rise);
            store(maximum_ + i, splat(-std::numeric_limits<float>::max()));
            store(mass_ + i, Floats{});
#if defined(SPARGE_BF16_DOT)
            for (int d = 0; d < padded; d += 2)
                store(
                    queries_ + d / 2 * Q_PITCH + i,
                    pack_bf16(load(query.wide + d * Q_PITCH + i), load(query.wide + (d + 1) * Q_PITCH + i)));
#endif
        }
    }

    // ln of the weights of the parts, by tile [nK]; NaN where a row's softmax is not a number.
    const float* run(const QueryTile& query, const KeyTiles& keys, const std::vector<Part>& parts) {
        const int count = static_cast<int>(parts.size());
        for (int first = 0; first < count; first += TOGETHER) {
            const int some = std::min(TOGETHER, count - first);
            gather(keys, &parts[first], some);
            for (int group = 0; group < rows_; group += GROUP) {
                score(query, keys, group, some);
                add_biases(group, some);
                for (int i = group; i < group + GROUP; i += LANES) advance(i, group, first, some);
            }
        }
        for (int i = 0; i < Q_TILE; i += LANES) store(mass_ + i, load(maximum_ + i) + log2(load(mass_ + i)));
        for (int i = 0; i < count; ++i)
            weights_[parts[i].tile] = largest_share(likely_ + size_t(i) * Q_TILE) * LN_2;
        return weights_;
    }

private:
    TileWeights(bool used, int key_tiles, int padded)
        : queries_(used ? size_t(padded) * Q_PITCH / 2 : 0), means_(used ? TOGETHER * CLUSTERS * padded : 0),
          scores_(used ? TOGETHER * CLUSTERS * GROUP : 0), likely_(used ? size_t(key_tiles) * Q_TILE : 0),
          weights_(used ? key_tiles : 0), rise_(Q_TILE), maximum_(Q_TILE), raised_(Q_TILE), mass_(Q_TILE),
          none_(GROUP) {}

    int rows_ = 0;
    bool any_bias_ = false;
    Aligned<int32_t> queries_;      // [padded / 2][Q_PITCH], pairs of channels in bf16
    Aligned<ClusterNumber> means_;  // [TOGETHER][CLUSTERS][padded / CHANNELS_PER_NUMBER]
    Aligned<float> scores_;         // [TOGETHER][CLUSTERS][GROUP], without the clusters' sizes
    Aligned<float> likely_;         // [parts][Q_TILE]
    Aligned<float> weights_;        // [nK]
    Aligned<float> rise_;           // [Q_TILE]: what spread 1 adds to a score
    Aligned<float> maximum_, raised_, mass_;  // [Q_TILE]: mass = 2^maximum * mass_
    Aligned<float> none_;           // [GROUP] of 0
    float sizes_[TOGETHER * CLUSTERS], spreads_[TOGETHER * CLUSTERS], biases_[TOGETHER];

    void gather(const KeyTiles& keys, const Part* parts, int count) {
        const int numbers = keys.cluster_numbers();
        any_bias_ = false;
        for (int i = 0; i < count; ++i) {
            const size_t tile = parts[i].tile;
            std::memcpy(means_ + i * numbers, &keys.cluster_means[tile * numbers], sizeof(ClusterNumber) * numbers);
            std::memcpy(sizes_ + i * CLUSTERS, &keys.cluster_sizes[tile * CLUSTERS], sizeof(float) * CLUSTERS);
            std::memcpy(spreads_ + i * CLUSTERS, &keys.cluster_spreads[tile * CLUSTERS], sizeof(float) * CLUSTERS);
            biases_[i] = to_bits(splat(parts[i].bias))[0];
            any_bias_ |= parts[i].bias != 0;
        }
    }

    // Scores of the clusters' means and the GROUP rows from `group` on; raised_ has the new maxima.
    void score(const QueryTile& query, const KeyTiles& keys, int group, int count) {
        const int steps = static_cast<int>(ceil_div(keys.dim, CHANNELS_PER_NUMBER));
#if defined(SPARGE_BF16_DOT)
        const Granule* queries = queries_ + group;
#else
        const float* queries = query.wide + group;
#endif
        std::memcpy(raised_ + group, maximum_ + group, sizeof(float) * GROUP);
        score_group<ClusterDot>(
            {means_, keys.padded / CHANNELS_PER_NUMBER, 1}, queries, steps, nullptr, query.factor + group, none_,
            count * CLUSTERS, scores_, raised_ + group);
    }

    void add_biases(int group, int count) {
        if (!any_bias_) return;
        for (int i = 0; i < GROUP; i += LANES) {
            Floats largest = load(maximum_ + group + i);
            for (int row = 0; row < count * CLUSTERS; ++row) {
                float* at = scores_ + row * GROUP + i;
                store(at, load(at) + biases_[row / CLUSTERS]);
                largest = maximum(load(at), largest);
            }
            store(raised_ + group + i, largest);
        }
    }

    // Adds the tiles to the masses of the LANES rows from `i` on, and writes what they may be to them.
    void advance(int i, int group, int first, int count) {
        const Floats largest = load(raised_ + i), rise = load(rise_ + i);
        Floats mass = load(mass_ + i) * exp2<false>(load(maximum_ + i) - largest);
        const float* scores = scores_ + i - group;
        for (int tile = 0; tile < count; ++tile, scores += CLUSTERS * GROUP) {
            const float *sizes = sizes_ + tile * CLUSTERS, *spreads = spreads_ + tile * CLUSTERS;
            Floats likely[CLUSTERS], top = splat(-std::numeric_limits<float>::max()), sum{};
            for (int c = 0; c < CLUSTERS; ++c) {
                const Floats score = load(scores + c * GROUP);
                mass += exp2<false>(score - largest) * sizes[c];
                likely[c] = score + rise * spreads[c];
                top = maximum(likely[c], top);
            }
            for (int c = 0; c < CLUSTERS; ++c) sum += exp2<false>(likely[c] - top) * sizes[c];
            store(likely_ + size_t(first + tile) * Q_TILE + i, top + log2(sum));
        }
        store(maximum_ + i, largest);
        store(mass_ + i, mass);
    }

    // Over the rows of one tile; mass_ is the logarithms by now.
    float largest_share(const float* likely) const {
        Floats largest = splat(-INF), check{};
        for (int i = 0; i < rows_; i += LANES) {
            Floats share = load(likely + i) - load(mass_ + i);
            if (i + LANES > rows_)
                for (int lane = rows_ - i; lane < LANES; ++lane) share[lane] = -INF;
            largest = maximum(share, largest);
            check += share;
        }
        float result = -INF;
        for (int lane = 0; lane < LANES; ++lane) {
            if (check[lane] != check[lane]) return NAN;
            result = largest[lane] > result ? largest[lane] : result;
        }
        return result;
    }
};

}  // namespace sparge
