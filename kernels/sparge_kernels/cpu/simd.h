// Vectors of the widest registers the compiler may use, and the few operations that need an instruction of their own.
// GCC and Clang vector types: AVX-512, AVX2 and NEON from one source. -DSPARGE_GENERIC leaves the special ones out.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#if !defined(SPARGE_GENERIC) && defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__)
#define SPARGE_AVX512 1
#if defined(__AVX512VNNI__)
#define SPARGE_INT8_DOT 1  // 4 products u8 x s8 a lane
#else
#define SPARGE_INT16_DOT 1  // 2 products s16 x s16 a lane
#endif
#if defined(__AVX512BF16__)
#define SPARGE_BF16_DOT 1  // 2 products bf16 x bf16 a lane
#endif
#include <immintrin.h>
#elif !defined(SPARGE_GENERIC) && defined(__AVX2__)
#define SPARGE_AVX2 1
#define SPARGE_INT16_DOT 1
#include <immintrin.h>
#endif

namespace sparge {

#if defined(SPARGE_AVX512)
constexpr int LANES = 16;
constexpr int VECTORS = 4;  // of queries in a product's register block
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int VECTORS = 2;
#else
constexpr int LANES = 4;
constexpr int VECTORS = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), may_alias));
typedef Floats UnalignedFloats __attribute__((aligned(4), may_alias));
typedef Ints UnalignedInts __attribute__((aligned(4), may_alias));

typedef int32_t Granule __attribute__((may_alias));  // 4 int8, 2 int16 or 2 bf16 as a product reads them

constexpr float INF = std::numeric_limits<float>::infinity();

inline Floats load(const float* p) { return *reinterpret_cast<const UnalignedFloats*>(p); }
inline void store(float* p, Floats x) { *reinterpret_cast<UnalignedFloats*>(p) = x; }
inline void store(int32_t* p, Ints x) { *reinterpret_cast<UnalignedInts*>(p) = x; }
inline Floats splat(float x) { return x - Floats{}; }
inline Ints splat(int32_t x) { return x - Ints{}; }
inline Floats select(Ints mask, Floats yes, Floats no) {  // a lane of the mask is 0 or -1
#if defined(SPARGE_AVX2)
    return reinterpret_cast<Floats>(_mm256_blendv_ps(
        reinterpret_cast<__m256>(no), reinterpret_cast<__m256>(yes), reinterpret_cast<__m256>(mask)));
#else
    return reinterpret_cast<Floats>((reinterpret_cast<Ints>(yes) & mask) | (reinterpret_cast<Ints>(no) & ~mask));
#endif
}

inline float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// a if a > b, else b: a NaN in `a` is passed over.
inline Floats maximum(Floats a, Floats b) {
#if defined(SPARGE_AVX512)
    return reinterpret_cast<Floats>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(SPARGE_AVX2)
    return reinterpret_cast<Floats>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
    return select(a > b, a, b);
#endif
}

inline Floats to_floats(Ints x) {
#if defined(SPARGE_AVX512)
    return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(reinterpret_cast<__m512i>(x)));
#else
    return __builtin_convertvector(x, Floats);
#endif
}

inline Floats magnitude(Floats x) { return maximum(x, -x); }  // NaN stays NaN
inline Ints is_finite(Floats x) { return magnitude(x) < INF; }

// Integers nearest to x, ties to even, as int8; |x| < 128.
inline void store_int8(int8_t* p, Floats x) {
#if defined(SPARGE_AVX512)
    __m512i whole = _mm512_cvtps_epi32(reinterpret_cast<__m512>(x));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(whole));
#elif defined(SPARGE_AVX2)
    __m256i whole = _mm256_cvtps_epi32(reinterpret_cast<__m256>(x));
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
#else
    for (int lane = 0; lane < LANES; ++lane) p[lane] = static_cast<int8_t>(std::nearbyint(x[lane]));
#endif
}

#if defined(SPARGE_INT16_DOT)
// The sum of the 2 products of a lane's halves, s16 x s16.
inline Ints dot_int16(Ints a, Ints b) {
#if defined(SPARGE_AVX512)
    return reinterpret_cast<Ints>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
    return reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#endif
}
#endif

#if defined(SPARGE_BF16_DOT)
// Pairs of bf16, `even` in the low halves.
inline Ints pack_bf16(Floats even, Floats odd) {
    const __m512i interleave = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
        16, 0);
    __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(odd), reinterpret_cast<__m512>(even));
    return reinterpret_cast<Ints>(_mm512_permutexvar_epi16(interleave, reinterpret_cast<__m512i>(both)));
}

// `first` and `second` as bf16, one after the other.
inline void store_bf16(int32_t* p, Floats first, Floats second) {
    __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
    store(p, reinterpret_cast<Ints>(both));
}
#endif

// While it lives, this thread's small numbers are not flushed to zero: torch.set_flush_denormal, or a library built
// with -ffast-math, sets that for some threads and not for others, and results must not depend on the thread.
class SmallNumbers {
public:
#if defined(__SSE__)
    SmallNumbers() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
    ~SmallNumbers() { _mm_setcsr(before_); }

private:
    unsigned before_;
#elif defined(__aarch64__)
    SmallNumbers() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" ::"r"(before_ & ~(uint64_t(1) << 24)));
    }
    ~SmallNumbers() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

private:
    uint64_t before_;
#else
    SmallNumbers() {}
#endif
};

inline bool any(Ints mask) {
#if defined(SPARGE_AVX512)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(SPARGE_AVX2)
    return !_mm256_testz_si256(reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256i>(mask));
#else
    int32_t all = 0;
    for (int lane = 0; lane < LANES; ++lane) all |= mask[lane];
    return all != 0;
#endif
}

inline float sum(Floats x) {
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += x[lane];
    return total;
}

// 2^x for x <= 0 or so, 0 for -inf, NaN for NaN; below 2^-126 it may be 0. Minimax polynomials of 2^fraction on
// [0, 1): relative error 7.5e-5 of degree 3 (weights that become bf16, whose own rounding is 25 times that), 1.8e-7 of
// degree 5, more than half of it fp32 rounding.
template <bool PRECISE>
inline Floats exp2(Floats x) {
    Floats fraction, value;
#if defined(SPARGE_AVX512)
    fraction = reinterpret_cast<Floats>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), 0x09));  // x - floor(x)
#else
    Floats inside = maximum(splat(-127.0f), x);  // a NaN stays: 2^-127 comes out as 0
#if defined(SPARGE_AVX2)
    Floats floor = reinterpret_cast<Floats>(_mm256_floor_ps(reinterpret_cast<__m256>(inside)));
    Ints whole = reinterpret_cast<Ints>(_mm256_cvtps_epi32(reinterpret_cast<__m256>(floor)));
    fraction = inside - floor;
#else
    Ints whole = __builtin_convertvector(inside, Ints);  // towards 0
    whole += (__builtin_convertvector(whole, Floats) > inside);  // a true comparison is -1
    fraction = inside - __builtin_convertvector(whole, Floats);
#endif
#endif
    if (PRECISE) {
        value = fraction * 1.877576673e-3f + 8.989340095e-3f;
        value = value * fraction + 5.582631805e-2f;
        value = value * fraction + 2.401536170e-1f;
        value = value * fraction + 6.931530732e-1f;
        value = value * fraction + 9.999999251e-1f;
    } else {
        value = fraction * 7.802452266e-2f + 2.260671554e-1f;
        value = value * fraction + 6.958335405e-1f;
        value = value * fraction + 9.999252186e-1f;
    }
#if defined(SPARGE_AVX512)
    return reinterpret_cast<Floats>(_mm512_scalef_ps(reinterpret_cast<__m512>(value), reinterpret_cast<__m512>(x)));
#else
    return value * reinterpret_cast<Floats>((whole + 127) << 23);
#endif
}

// log2(x) for normal x > 0, -inf for 0, NaN for NaN; within 1.2e-4.
inline Floats log2(Floats x) {
#if defined(SPARGE_AVX512)
    const Floats exponent = reinterpret_cast<Floats>(_mm512_getexp_ps(reinterpret_cast<__m512>(x)));
    const Floats mantissa = reinterpret_cast<Floats>(
        _mm512_getmant_ps(reinterpret_cast<__m512>(x), _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src));
#else
    const Ints bits = reinterpret_cast<Ints>(x);
    const Floats exponent = to_floats((bits >> 23) - 127);
    const Floats mantissa = reinterpret_cast<Floats>((bits & 0x007fffff) | 0x3f800000);
#endif
    Floats value = mantissa * -7.844067621e-2f + 6.260321822e-1f;
    value = value * mantissa - 2.078335168f;
    value = value * mantissa + 4.029211391f;
    value = value * mantissa - 2.498353149f + exponent;
#if !defined(SPARGE_AVX512)
    value = select(x > 0.0f, value, splat(-INF));
    value = select(x < INF, value, x);  // infinity and NaN
#endif
    return value;
}

}  // namespace sparge
