// Stage 1: the K tiles a query tile will visit (predict.py; SpargeAttn, section 3.2).
#pragma once

#include "mask.h"
#include "weights.h"

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
    std::vector<Kept> tiles;   // ascending, once something was kept of the candidates
    std::vector<Part> parts;   // "clusters": tiles with a part in the softmax, candidates and kept ones
    int visible = 0;           // tiles that are not hidden

    Selection(const Call& call, int key_tiles) {
        tiles.reserve(key_tiles), ranked_.reserve(key_tiles);
        if (call.predictor == CLUSTERED) parts.reserve(key_tiles);
    }

    // Keeps what is kept without asking; the others are candidates.
    void sort(
        const Call& call, const QueryTile& query, const KeyTiles& keys, const Thresholds& t, Visible seen,
        const uint8_t* mask_kinds, const float* mask_means) {
        tiles.clear();
        parts.clear();
        ranked_.clear();
        visible = 0;
        const bool clustered = call.predictor == CLUSTERED;
        const bool predictable = clustered ? query.similarity == query.similarity : query.similarity >= t.similarity;
        for (int tile = 0; tile < seen.end; ++tile) {
            MaskKind kind = tile >= seen.past ? PARTIAL : mask_kinds ? static_cast<MaskKind>(mask_kinds[tile]) : OPEN;
            if (kind == HIDDEN) continue;
            ++visible;
            const float bias = kind == BIASED ? mask_means[tile] : 0;
            if (clustered && kind != PARTIAL && keys.finite[tile]) parts.push_back({tile, bias});
            const bool candidate = kind != PARTIAL && predictable && keys.similarity[tile] >= t.similarity;
            if (candidate) ranked_.push_back({bias, {tile, kind}});
            else tiles.push_back({tile, kind});
        }
    }

    // Whether any candidate can be dropped.
    bool has_choice(const Thresholds& t) const {
        return t.topk > 0 ? allowed(t) < ranked_.size() : t.cdf < 1 && !ranked_.empty();
    }

    void keep_all() { take(ranked_.size()); }

    // Predictor "sparge": the candidates of the largest scores.
    void keep_largest(const Call& call, const QueryTile& query, const KeyTiles& keys, const Thresholds& t) {
        float largest = -INF;
        bool is_number = true;
        for (Candidate& c : ranked_) {
            c.score += proxy(call, query, keys, c.kept.tile);
            is_number &= c.score == c.score;
            largest = std::max(largest, c.score);
        }
        // inf or NaN: the softmax of the proxy is not a number, and nothing can be predicted.
        if (!is_number || std::fabs(largest) == INF) return keep_all();
        if (t.topk > 0) return take_best(allowed(t));
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
        in_order();
    }

    // Predictor "clusters": all candidates but those of the smallest weights; `weights` [nK] in nats.
    void drop_smallest(const float* weights, const Thresholds& t) {
        for (Candidate& c : ranked_) {
            c.score = weights[c.kept.tile];
            if (c.score != c.score) return keep_all();
        }
        if (t.topk > 0) return take_best(allowed(t));
        std::sort(ranked_.begin(), ranked_.end(), [](const Candidate& a, const Candidate& b) { return a.before(b); });
        size_t kept = ranked_.size();
        float dropped = 0;
        for (; kept > 0; --kept) {
            dropped += std::exp(ranked_[kept - 1].score);
            if (dropped > 1 - t.cdf) break;
        }
        take(kept);
    }

private:
    struct Candidate {
        float score;  // before there is one: the mean of the mask
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

    size_t allowed(const Thresholds& t) const {
        const double share = std::ceil(static_cast<double>(ranked_.size()) * t.topk - CEIL_SLACK);
        return std::min(ranked_.size(), static_cast<size_t>(std::max(1.0, share)));
    }

    void take_best(size_t count) {
        auto before = [](const Candidate& a, const Candidate& b) { return a.before(b); };
        if (count < ranked_.size()) std::nth_element(ranked_.begin(), ranked_.begin() + count, ranked_.end(), before);
        take(count);
    }

    void take(size_t count) {
        for (size_t i = 0; i < count; ++i) tiles.push_back(ranked_[i].kept);
        in_order();
    }

    void in_order() {
        std::sort(tiles.begin(), tiles.end(), [](const Kept& a, const Kept& b) { return a.tile < b.tile; });
    }
};

}  // namespace sparge
