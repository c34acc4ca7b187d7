// Predictor "clusters", K side: the 64 keys of a tile as a few groups (clusters.py, which is the specification).
#pragma once

#include "queries.h"

namespace sparge {

// One tile's keys twice: rows to sum, and channels over keys to measure distances, all keys at once.
class Splitter {
public:
    // `rows` [K_TILE][padded] and `columns` [padded][K_TILE] are scratch.
    Splitter(int count, int padded, const float* rows, float* columns)
        : count_(count), padded_(padded), rows_(rows), columns_(columns) {
        transpose(rows, K_TILE, padded, padded, columns, K_TILE);
        for (int key = 0; key < K_TILE; ++key) labels_[key] = key < count ? 0 : CLUSTERS;
    }

    // Writes means [CLUSTERS][padded]; sizes [CLUSTERS], and spreads where they are not 0: the mean over keys and `dim`
    // channels of the squared distances to the mean.
    void run(int dim, float* means, float* sizes, float* spreads) {
        mean(0, means);
        measure(0, means);
        for (int made = 1; made < CLUSTERS; ++made) {
            const int farthest = farthest_key(), split = labels_[farthest];
            float distances[K_TILE];
            squared_distances(rows_ + farthest * padded_, distances);
            bool taken = false;
            for (int key = 0; key < count_; ++key)
                if (labels_[key] == split && distances[key] < distances_[key]) labels_[key] = made, taken = true;
            if (!taken) continue;  // all keys are at their means
            mean(split, means + split * padded_);
            mean(made, means + made * padded_);
            measure(split, means + split * padded_);
            measure(made, means + made * padded_);
        }
        for (int c = 0; c < CLUSTERS; ++c) sizes[c] = spreads[c] = 0;
        for (int key = 0; key < count_; ++key) {
            sizes[labels_[key]] += 1;
            spreads[labels_[key]] += distances_[key] / static_cast<float>(dim);
        }
        for (int c = 0; c < CLUSTERS; ++c) spreads[c] /= std::max(sizes[c], 1.0f);
    }

private:
    int count_, padded_;
    const float* rows_;
    float* columns_;
    int32_t labels_[K_TILE];
    float distances_[K_TILE];  // squared, of each key to its cluster's mean

    void mean(int cluster, float* result) const {
        float size = 0;
        std::memset(result, 0, sizeof(float) * padded_);
        for (int key = 0; key < count_; ++key) {
            if (labels_[key] != cluster) continue;
            size += 1;
            const float* row = rows_ + key * padded_;
            for (int d = 0; d < padded_; d += LANES) store(result + d, load(result + d) + load(row + d));
        }
        for (int d = 0; d < padded_; d += LANES) store(result + d, load(result + d) / std::max(size, 1.0f));
    }

    void squared_distances(const float* point, float* result) const {
        Floats sums[K_TILE / LANES] = {};
        for (int d = 0; d < padded_; ++d)
            for (int i = 0; i < K_TILE / LANES; ++i) {
                const Floats difference = load(columns_ + d * K_TILE + i * LANES) - splat(point[d]);
                sums[i] += difference * difference;
            }
        for (int i = 0; i < K_TILE / LANES; ++i) store(result + i * LANES, sums[i]);
    }

    // The distances of the cluster's keys, anew.
    void measure(int cluster, const float* mean) {
        float distances[K_TILE];
        squared_distances(mean, distances);
        for (int key = 0; key < K_TILE; ++key) distances_[key] = labels_[key] == cluster ? distances[key] : distances_[key];
    }

    int farthest_key() const {
        int farthest = 0;
        for (int key = 1; key < count_; ++key)
            if (distances_[key] > distances_[farthest]) farthest = key;
        return farthest;
    }
};

inline void pack_cluster_means(const float* means, int count, ClusterNumber* packed) {
#if defined(SPARGE_BF16_DOT)
    for (int i = 0; i < count; i += 2)
        packed[i / 2] = static_cast<int32_t>(
            float_to_bfloat16(means[i]) | static_cast<uint32_t>(float_to_bfloat16(means[i + 1])) << 16);
#else
    std::memcpy(packed, means, sizeof(float) * count);
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
