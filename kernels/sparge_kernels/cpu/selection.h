// Stage 1: the K tiles a query tile will visit (predict.py; SpargeAttn, section 3.2).
#pragma once

#include "mask.h"
#include "queries.h"

namespace sparge {

constexpr double CEIL_SLACK = 1e-6;  // predict.py

// The K tiles a query tile sees whole (< past) and the diagonal ones it sees in part (past <= tile < end).
struct Visible {
    int past, end;
    Visible(const Call& call, int tile, int rows, int key_tiles) : past(key_tiles), end(key_tiles) {
        if (!call.is_causal) return;
        int64_t first = int64_t(tile) * Q_TILE;
        past = call.k_len <= first ? key_tiles : static_cast<int>(first / K_TILE);
        end = std::max(past, static_cast<int>(ceil_div(std::min(first + rows, call.k_len), K_TILE)));
    }
};

class Selection {
public:
    struct Kept {
        int32_t tile;
        MaskKind kind;  // PARTIAL: exact scores, never skipped
    };
    std::vector<Kept> tiles;  // ascending
    int visible = 0;          // tiles that are not hidden

    explicit Selection(int key_tiles) { tiles.reserve(key_tiles), ranked_.reserve(key_tiles); }

    void run(
        const Call& call, const QueryTile& query, const KeyTiles& keys, const Thresholds& t, Visible seen,
        const uint8_t* mask_kinds, const float* mask_means) {
        tiles.clear();
        ranked_.clear();
        visible = 0;
        const bool predictable = query.similarity >= t.similarity;
        for (int tile = 0; tile < seen.end; ++tile) {
            MaskKind kind = tile >= seen.past ? PARTIAL : mask_kinds ? static_cast<MaskKind>(mask_kinds[tile]) : OPEN;
            if (kind == HIDDEN) continue;
            ++visible;
            if (kind != PARTIAL && predictable && keys.similarity[tile] >= t.similarity) {
                float bias = kind == BIASED ? mask_means[tile] : 0;
                ranked_.push_back({proxy(call, query, keys, tile) + bias, {tile, kind}});
            } else {
                tiles.push_back({tile, kind});
            }
        }
        keep_largest(t);
        std::sort(tiles.begin(), tiles.end(), [](const Kept& a, const Kept& b) { return a.tile < b.tile; });
    }

private:
    struct Candidate {
        float score;
        Kept kept;
        // Ranks before: the larger score, or of equal ones the lower tile.
        bool before(const Candidate& other) const {
            return score > other.score || (score == other.score && kept.tile < other.kept.tile);
        }
    };
    std::vector<Candidate> ranked_;

    static float proxy(const Call& call, const QueryTile& query, const KeyTiles& keys, int tile) {
        const float* mean = &keys.means[size_t(tile) * keys.padded];
        Floats products{};
        for (int d = 0; d < keys.padded; d += LANES) products += load(query.mean + d) * load(mean + d);
        return sum(products) * call.scale;
    }

    void take(size_t count) {
        for (size_t i = 0; i < count; ++i) tiles.push_back(ranked_[i].kept);
    }

    void keep_largest(const Thresholds& t) {
        if (ranked_.empty()) return;
        float largest = -INF;
        bool is_number = true;
        for (const Candidate& c : ranked_) {
            is_number &= c.score == c.score;
            largest = std::max(largest, c.score);
        }
        // inf or NaN: the softmax of the proxy is not a number, and nothing can be predicted.
        if (!is_number || std::fabs(largest) == INF) return take(ranked_.size());
        auto before = [](const Candidate& a, const Candidate& b) { return a.before(b); };
        if (t.topk > 0) {
            const double allowed = std::ceil(static_cast<double>(ranked_.size()) * t.topk - CEIL_SLACK);
            const size_t count = std::min(ranked_.size(), static_cast<size_t>(std::max(1.0, allowed)));
            if (count < ranked_.size())
                std::nth_element(ranked_.begin(), ranked_.begin() + count, ranked_.end(), before);
            return take(count);
        }
        if (t.cdf >= 1) return take(ranked_.size());
        float mass = 0, reached = 0;
        for (const Candidate& c : ranked_) mass += std::exp(c.score - largest);
        auto after = [](const Candidate& a, const Candidate& b) { return b.before(a); };
        std::make_heap(ranked_.begin(), ranked_.end(), after);
        auto end = ranked_.end();
        while (end != ranked_.begin() && reached < t.cdf) {
            std::pop_heap(ranked_.begin(), end, after);
            --end;
            reached += std::exp(end->score - largest) / mass;
            tiles.push_back(end->kept);
        }
    }
};

}  // namespace sparge
