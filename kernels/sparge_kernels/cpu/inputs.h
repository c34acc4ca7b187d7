// The call as Python describes it (native.py mirrors `Call` field by field), and reading rows of any dtype and stride.
#pragma once

#include <algorithm>

#include "products.h"

namespace sparge {

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, BOOL = 3 };
enum Predictor : int32_t { SPARGE = 0, CLUSTERED = 1 };

struct Tensor {  // [batch, heads, tokens, dim], strides in elements
    void* data;
    int64_t strides[4];
};

struct Thresholds {
    double topk;       // 0: use cdf
    float cdf;
    float similarity;
    float skip_below;  // stage 2's lambda in nats
};

struct Call {
    Tensor q, k, v, out, mask;  // mask.data may be null; a broadcast dimension has stride 0
    const Thresholds* thresholds;  // [q_heads]
    float* density;     // [batch, q_heads]
    float* pv_skipped;  // [batch, q_heads]
    uint8_t* kept;      // [batch, q_heads, nQ, nK], or null
    int64_t batch, q_heads, kv_heads, q_len, k_len, dim, value_dim;
    float scale;
    int32_t dtype, mask_dtype, is_causal, int8, predictor, threads;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int round_up(int64_t a, int64_t b) { return static_cast<int>(ceil_div(a, b) * b); }

inline float half_to_float(uint16_t half) {
    // Shift exponent and mantissa into place and repair the exponent's bias; subnormals come out exact.
    float magnitude = bits_to_float(static_cast<uint32_t>(half & 0x7fff) << 13) * bits_to_float(0x77800000);  // 2^112
    uint32_t special = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // inf and NaN
    return bits_to_float(float_to_bits(magnitude) | special | static_cast<uint32_t>(half & 0x8000) << 16);
}

inline uint16_t float_to_half(float x) {
    uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds beyond 65504
    if (bits < 0x38800000)  // subnormal: let the addition round
        return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(bits) + 0.5f) - 0x3f000000));
    bits += 0xfff + (bits >> 13 & 1);  // to nearest, ties to even
    return static_cast<uint16_t>(sign | (bits - 0x38000000) >> 13);
}

inline float bfloat16_to_float(uint16_t x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }

inline uint16_t float_to_bfloat16(float x) {
    uint32_t bits = float_to_bits(x);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float read(const void* data, int64_t at, int32_t dtype) {
    if (dtype == FLOAT32) return static_cast<const float*>(data)[at];
    if (dtype == BOOL) return static_cast<const uint8_t*>(data)[at] ? 0.0f : -INF;
    uint16_t x = static_cast<const uint16_t*>(data)[at];
    return dtype == BFLOAT16 ? bfloat16_to_float(x) : half_to_float(x);
}

// `count` numbers from element `at` on, `stride` apart, as fp32; a bool is 0 or -inf, as in a mask.
inline void read_row(const void* data, int64_t at, int64_t stride, int count, int32_t dtype, float* row) {
    if (stride != 1) {
        for (int i = 0; i < count; ++i) row[i] = read(data, at + i * stride, dtype);
    } else if (dtype == FLOAT32) {
        std::memcpy(row, static_cast<const float*>(data) + at, sizeof(float) * count);
    } else if (dtype == BOOL) {
        const uint8_t* source = static_cast<const uint8_t*>(data) + at;
        for (int i = 0; i < count; ++i) row[i] = source[i] ? 0.0f : -INF;
    } else if (dtype == BFLOAT16) {
        const uint16_t* source = static_cast<const uint16_t*>(data) + at;
        for (int i = 0; i < count; ++i) row[i] = bfloat16_to_float(source[i]);
    } else {
        const uint16_t* source = static_cast<const uint16_t*>(data) + at;
        for (int i = 0; i < count; ++i) row[i] = half_to_float(source[i]);
    }
}

inline void write_row(void* data, int64_t at, int64_t stride, int count, int32_t dtype, const float* row) {
    if (dtype == FLOAT32) {
        float* target = static_cast<float*>(data) + at;
        for (int i = 0; i < count; ++i) target[i * stride] = row[i];
    } else {
        // A mean of values lies between them: what rounding puts beyond the largest number is that number.
        const float most = dtype == BFLOAT16 ? bits_to_float(0x7f7f0000) : 65504.0f;
        uint16_t* target = static_cast<uint16_t*>(data) + at;
        for (int i = 0; i < count; ++i) {
            float x = row[i];
            if (std::fabs(x) > most && std::fabs(x) < INF) x = std::copysign(most, x);
            target[i * stride] = dtype == BFLOAT16 ? float_to_bfloat16(x) : float_to_half(x);
        }
    }
}

// One head of a tensor, its rows [tokens] of fp32.
struct Rows {
    const void* data;
    int64_t start, token_stride, stride;
    int dim;
    int32_t dtype;

    Rows(const Tensor& x, int64_t b, int64_t h, int64_t dim, int32_t dtype)
        : data(x.data), start(b * x.strides[0] + h * x.strides[1]), token_stride(x.strides[2]), stride(x.strides[3]),
          dim(static_cast<int>(dim)), dtype(dtype) {}

    void get(int64_t token, float* row) const { read_row(data, start + token * token_stride, stride, dim, dtype, row); }

    // The row with zeros up to `padded` numbers: in place if it needs none, else in `buffer`.
    const float* get(int64_t token, float* buffer, int padded) const {
        if (dtype == FLOAT32 && stride == 1 && dim == padded)
            return static_cast<const float*>(data) + start + token * token_stride;
        get(token, buffer);
        for (int d = dim; d < padded; ++d) buffer[d] = 0;
        return buffer;
    }

    // Rows `token`... as fp32 in place if that is what they are, else copied to `buffer` [count][dim].
    const float* get_many(int64_t token, int count, float* buffer, ptrdiff_t* row_stride) const {
        if (dtype == FLOAT32 && stride == 1) {
            *row_stride = token_stride;
            return static_cast<const float*>(data) + start + token * token_stride;
        }
        for (int i = 0; i < count; ++i) get(token + i, buffer + i * dim);
        *row_stride = dim;
        return buffer;
    }
};

// `padded` is whole vectors.
inline bool all_finite(const float* row, int padded) {
    Ints finite = splat(-1);
    for (int i = 0; i < padded; i += LANES) finite &= is_finite(load(row + i));
    return !any(~finite);
}

}  // namespace sparge
