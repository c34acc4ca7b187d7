// One tile of 128 queries, transposed and quantized.
#pragma once

#include "keys.h"

namespace sparge {

constexpr float LOG2_E = 1.4426950408889634f;

template <class T>
struct Aligned {  // scratch memory on cache lines
    T* data = nullptr;
    explicit Aligned(size_t count) {
        size_t bytes = count * sizeof(T);
#if !defined(__SANITIZE_ADDRESS__)  // which is to see every step beyond the end
        bytes = (bytes + 63) / 64 * 64 + 64;
#endif
        data = static_cast<T*>(::operator new(bytes, std::align_val_t(64)));
        std::memset(static_cast<void*>(data), 0, bytes);
    }
    Aligned(const Aligned&) = delete;
    Aligned(Aligned&& other) noexcept : data(other.data) { other.data = nullptr; }
    ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
    operator T*() const { return data; }
};

// dst[column][row] = src[row][column], for LANES rows and columns.
inline void transpose_block(const float* src, ptrdiff_t src_stride, float* dst, ptrdiff_t dst_stride) {
#if defined(SPARGE_AVX512)
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(src + i * src_stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm512_shuffle_ps(b[i + j], b[i + 2 + j], 0x44);
            a[i + 2 * j + 1] = _mm512_shuffle_ps(b[i + j], b[i + 2 + j], 0xee);
        }
    for (int j = 0; j < 4; ++j) {  // 128-bit lanes
        b[j] = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88);
        b[4 + j] = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
        b[8 + j] = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
        b[12 + j] = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    }
    for (int j = 0; j < 4; ++j) {
        _mm512_storeu_ps(dst + j * dst_stride, _mm512_shuffle_f32x4(b[j], b[8 + j], 0x88));
        _mm512_storeu_ps(dst + (8 + j) * dst_stride, _mm512_shuffle_f32x4(b[j], b[8 + j], 0xdd));
        _mm512_storeu_ps(dst + (4 + j) * dst_stride, _mm512_shuffle_f32x4(b[4 + j], b[12 + j], 0x88));
        _mm512_storeu_ps(dst + (12 + j) * dst_stride, _mm512_shuffle_f32x4(b[4 + j], b[12 + j], 0xdd));
    }
#else
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < LANES; ++j) dst[j * dst_stride + i] = src[i * src_stride + j];
#endif
}

inline void transpose(const float* src, int rows, int columns, ptrdiff_t src_stride, float* dst, ptrdiff_t dst_stride) {
    for (int i = 0; i < rows; i += LANES)
        for (int j = 0; j < columns; j += LANES)
            transpose_block(src + i * src_stride + j, src_stride, dst + j * dst_stride + i, dst_stride);
}

struct QueryTile {
    int rows = 0;               // real queries, <= 128
    float similarity = 0;       // NaN if the mean is not finite
    bool any_exact = false;
    Aligned<float> mean;        // [padded]
    Aligned<float> wide;        // [padded][Q_PITCH], fp32
    Aligned<float> codes;       // [granules][Q_PITCH]
    Aligned<float> code_factor; // [128]: score in bits = code product * this * the K tile's scale + offset
    Aligned<float> factor;      // [128]: the same for the exact product
    Aligned<float> offset;      // [128]: 0, or -inf for lanes without a query
    Aligned<int32_t> exact;     // [128]: -1 where INT8 cannot hold the row
    Aligned<float> lines;       // [128][padded], scratch

    explicit QueryTile(const Call& call)
        : mean(round_up(call.dim, LANES)), wide(size_t(round_up(call.dim, LANES)) * Q_PITCH),
          codes(size_t(round_up(call.dim, LANES)) * Q_PITCH), code_factor(Q_TILE), factor(Q_TILE), offset(Q_TILE),
          exact(Q_TILE), lines(size_t(round_up(call.dim, LANES)) * Q_TILE) {}

    void prepare(const Call& call, const Rows& q, int tile) {
        const int dim = q.dim, padded = round_up(dim, LANES);
        const int64_t first = int64_t(tile) * Q_TILE;
        rows = static_cast<int>(std::min<int64_t>(Q_TILE, call.q_len - first));
        std::memset(mean, 0, sizeof(float) * padded);
        float total[MAX_DIM] = {};
        for (int i = 0; i < rows; ++i) {
            float* line = lines + i * padded;
            const float* row = q.get(first + i, line, padded);
            for (int d = 0; d < padded; d += LANES) {
                store(line + d, load(row + d));
                store(mean + d, load(mean + d) + load(row + d));
            }
            add_unit_row(line, padded, total);
        }
        std::memset(lines + rows * padded, 0, sizeof(float) * (Q_TILE - rows) * padded);
        for (int d = 0; d < padded; ++d) mean[d] /= static_cast<float>(rows);
        similarity = all_finite(mean, padded) ? similarity_of(total, padded, rows) : NAN;
        transpose(lines, Q_TILE, padded, padded, wide, Q_PITCH);
        for (int i = 0; i < Q_TILE; ++i) {
            factor[i] = call.scale * LOG2_E;
            offset[i] = i < rows ? 0 : -INF;
        }
        if (call.int8) quantize(call, padded);
    }

    int8_t code(int query, int d) const {
        Code granule[CODES];
        std::memcpy(granule, codes + d / CODES * Q_PITCH + query, sizeof granule);
        return static_cast<int8_t>(granule[d % CODES] - CODE_OFFSET);
    }

private:
    // One scale per row. Granules of codes are transposed as the fp32 lines are, in their place.
    void quantize(const Call& call, int padded) {
        any_exact = false;
        for (int i = 0; i < Q_TILE; ++i) {
            const float* row = lines + i * padded;
            const float largest = largest_magnitude(row, padded);
            exact[i] = usable_scale(largest) && all_finite(row, padded) ? 0 : -1;
            any_exact |= exact[i] != 0;
            const float scale = exact[i] ? 0.0f : largest / LARGEST_CODE;
            code_factor[i] = scale * (call.scale * LOG2_E);
            int8_t line[MAX_DIM] = {};
            if (scale != 0) row_codes(row, padded, scale, line);
            write_codes(line, padded, i);
        }
        const int granules = round_up(padded / CODES, LANES);
        transpose(lines, Q_TILE, granules, granules, codes, Q_PITCH);
    }

    // The codes of query i, in the place of its line or of one before it, which is done with.
    void write_codes(const int8_t* line, int padded, int i) {
        float* target = lines + i * round_up(padded / CODES, LANES);
        for (int d = 0; d < padded; d += CODES) {
            Code granule[CODES];
            for (int j = 0; j < CODES; ++j) granule[j] = static_cast<Code>(line[d + j] + CODE_OFFSET);
            std::memcpy(target + d / CODES, granule, sizeof granule);
        }
    }
};

}  // namespace sparge
