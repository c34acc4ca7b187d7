// Predictor "clusters", K side: the 64 keys of a tile as a few groups (clusters.py, which is the specification).
#pragma once

#include "queries.h"

namespace sparge {

// One tile's keys twice: rows to sum, and channels over keys to measure distances, all keys at once.
class Splitter {
public:
    // `rows` [K_TILE][padded], zeros beyond `count`, and `columns` [padded][K_TILE] are scratch.
    Splitter(int count, int padded, const float* rows, float* columns)
        : count_(count), padded_(padded), rows_(rows), columns_(columns) {
        transpose(rows, K_TILE, padded, padded, columns, K_TILE);
        for (int key = 0; key < K_TILE; ++key) labels_[key] = key < count ? 0 : CLUSTERS;
    }

    // Writes means [CLUSTERS][padded]; sizes [CLUSTERS], and spreads where they are not 0: the mean over `dim`
    // channels of the variance, at least the largest / LOUDEST.
    void run(int dim, float* means, float* sizes, float* spreads) {
        for (int key = 0; key < K_TILE; ++key) distances_[key] = -1.0f;  // of padding
        represent(0, means);
        for (int made = 1; made < CLUSTERS; ++made) {
            const int farthest = farthest_key(), split = labels_[farthest];
            if (!take(rows_ + farthest * padded_, split, made)) continue;  // all keys are at their means
            represent(split, means + split * padded_);
            represent(made, means + made * padded_);
        }
        for (int c = 0; c < CLUSTERS; ++c) {
            Floats members{}, spread{};
            for (int key = 0; key < K_TILE; key += LANES) {
                members += select(of_cluster(key, c), splat(1.0f), Floats{});
                spread += select(of_cluster(key, c), load(distances_ + key) / static_cast<float>(dim), Floats{});
            }
            sizes[c] = sum(members);
            const float size = std::max(sizes[c], 1.0f);
            spreads[c] = std::max(sum(spread) / size, loudest(c, means + c * padded_) / size / LOUDEST);
        }
    }

private:
    int count_, padded_;
    const float* rows_;
    float* columns_;
    alignas(64) int32_t labels_[K_TILE];
    alignas(64) float distances_[K_TILE];  // squared, of each key to its cluster's mean

    Ints of_cluster(int first_key, int cluster) const {
        return *reinterpret_cast<const Ints*>(labels_ + first_key) == splat(cluster);
    }

    // The cluster's mean [padded], and the distances of its keys to it.
    void represent(int cluster, float* mean) {
        float member[K_TILE];
        Floats members{};
        for (int key = 0; key < K_TILE; key += LANES) {
            const Floats is_member = select(of_cluster(key, cluster), splat(1.0f), Floats{});
            store(member + key, is_member);
            members += is_member;
        }
        const float size = std::max(sum(members), 1.0f);
        for (int d = 0; d < padded_; d += LANES) {
            Floats sums[4] = {};  // additions that need not wait for each other
            for (int key = 0; key < K_TILE; key += 4)
                for (int i = 0; i < 4; ++i) sums[i] += load(rows_ + (key + i) * padded_ + d) * member[key + i];
            store(mean + d, (sums[0] + sums[1] + (sums[2] + sums[3])) / size);
        }
        float distances[K_TILE];
        measure(mean, distances);
        for (int key = 0; key < K_TILE; key += LANES)
            store(distances_ + key, select(of_cluster(key, cluster), load(distances + key), load(distances_ + key)));
    }

    // Squared distances of all keys to a point [padded].
    void measure(const float* point, float* result) const {
        Floats sums[K_TILE / LANES] = {};
        for (int d = 0; d < padded_; ++d)
            for (int i = 0; i < K_TILE / LANES; ++i) {
                const Floats difference = load(columns_ + d * K_TILE + i * LANES) - point[d];
                sums[i] += difference * difference;
            }
        for (int i = 0; i < K_TILE / LANES; ++i) store(result + i * LANES, sums[i]);
    }

    // The largest sum over the cluster's keys of a channel's squared distance to the mean [padded].
    float loudest(int cluster, const float* mean) const {
        float most = 0;
        for (int d = 0; d < padded_; ++d) {
            Floats sums{};
            for (int key = 0; key < K_TILE; key += LANES) {
                const Floats difference = load(columns_ + d * K_TILE + key) - mean[d];
                sums += select(of_cluster(key, cluster), difference * difference, Floats{});
            }
            most = std::max(most, sum(sums));
        }
        return most;
    }

    int farthest_key() const {
        Floats most = load(distances_);
        for (int key = LANES; key < K_TILE; key += LANES) most = maximum(load(distances_ + key), most);
        float largest = -1.0f;
        for (int lane = 0; lane < LANES; ++lane) largest = most[lane] > largest ? most[lane] : largest;
        for (int key = 0; key < count_; ++key)
            if (distances_[key] == largest) return key;
        return 0;
    }

    // Moves the keys of cluster `from` that are closer to the point than to their mean; false if there are none.
    bool take(const float* point, int from, int to) {
        float distances[K_TILE];
        measure(point, distances);
        Ints taken_any{};
        for (int key = 0; key < K_TILE; key += LANES) {
            const Ints taken = of_cluster(key, from) & (load(distances + key) < load(distances_ + key));
            const Ints labels = *reinterpret_cast<const Ints*>(labels_ + key);
            store(labels_ + key, (labels & ~taken) | (splat(to) & taken));
            taken_any |= taken;
        }
        return any(taken_any);
    }
};

inline void pack_cluster_means(const float* means, int count, ClusterNumber* packed) {
#if defined(SPARGE_BF16_DOT)
    for (int i = 0; i < count; i += 2 * LANES) store_bf16(packed + i / 2, load(means + i), load(means + i + LANES));
#else
    std::memcpy(packed, means, sizeof(float) * count);
#endif
}

// Channel d of a cluster's mean, as the scores are computed from it.
inline float cluster_mean(const KeyTiles& keys, int tile, int cluster, int d) {
    const ClusterNumber* mean = &keys.cluster_means[size_t(tile) * keys.cluster_numbers()];
    const int at = cluster * keys.padded + d;
#if defined(SPARGE_BF16_DOT)
    return bfloat16_to_float(static_cast<uint16_t>(static_cast<uint32_t>(mean[at / 2]) >> at % 2 * 16));
#else
    return mean[at];
#endif
}

// Means, sizes and spreads of one tile whose K is finite. `buffer` is [K_TILE][2 * padded]. A cluster of no keys is a
// copy of another with size 0: its scores are numbers, and count for nothing.
inline void cluster_tile(const Call& call, const Rows& k, KeyTiles& keys, int tile, float* buffer) {
    const int count = keys_in_tile(call, tile), padded = keys.padded;
    std::memset(buffer, 0, sizeof(float) * K_TILE * padded);
    for (int i = 0; i < count; ++i) {
        const float* row = k.get(int64_t(tile) * K_TILE + i, buffer + i * padded, padded);
        if (row != buffer + i * padded) std::memcpy(buffer + i * padded, row, sizeof(float) * padded);
    }
    float means[CLUSTERS * MAX_DIM] = {};
    float* sizes = &keys.cluster_sizes[size_t(tile) * CLUSTERS];
    float* spreads = &keys.cluster_spreads[size_t(tile) * CLUSTERS];
    Splitter(count, padded, buffer, buffer + K_TILE * padded).run(keys.dim, means, sizes, spreads);
    int filled = 0;
    while (sizes[filled] == 0) ++filled;
    for (int c = 0; c < CLUSTERS; ++c) {
        if (sizes[c] > 0) continue;
        std::memcpy(means + c * padded, means + filled * padded, sizeof(float) * padded);
        spreads[c] = spreads[filled];
    }
    pack_cluster_means(means, CLUSTERS * padded, &keys.cluster_means[size_t(tile) * keys.cluster_numbers()]);
}

}  // namespace sparge
