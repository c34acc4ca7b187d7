// The matrix products of one tile: C[row][query] = sum over steps of A[row][step] * B[step][query].
//
// Everything is laid out so that vectors run over the 128 queries of a tile: scores and weights are [key][query], the
// output is [channel][query]. Row maxima, sums, scales and masks are then plain vector operations, without a single
// horizontal one, and the weights of one product are the B operand of the next without a transpose.
//
// One step is one 32-bit granule of A against one of B: a float, 2 bf16, 2 int16 or 4 int8, chosen by the Dot type. A
// granules are broadcast from memory, so A may have any strides.
#pragma once

#include "simd.h"

namespace sparge {

constexpr int Q_TILE = 128;
constexpr int Q_PITCH = Q_TILE + 16;  // of Q's channels: a power of two would put them all into a few sets of the cache
constexpr int K_TILE = 64;
#if defined(SPARGE_AVX2)
constexpr int BLOCK_ROWS = 6;  // 12 sums, 2 of B and one of A: of 16 registers; 8 sums do not fill the latency
#else
constexpr int BLOCK_ROWS = 4;
#endif
constexpr int GROUP = LANES * VECTORS;  // queries of a register block
static_assert(Q_TILE % GROUP == 0, "tiles are whole groups");

struct DotFloat {
    using Sum = Floats;
    using Granule = float;
    static inline Sum broadcast(float x) { return splat(x); }
    static inline Sum add(Sum sum, Floats a, Floats b) { return sum + a * b; }
    static inline Floats load_b(const Granule* p) { return *reinterpret_cast<const Floats*>(p); }
    static inline Floats load_a(Granule x) { return splat(x); }
    static inline Floats value(Sum sum) { return sum; }
};

#if defined(SPARGE_INT8_DOT) || defined(SPARGE_INT16_DOT)
struct DotInts {
    using Sum = Ints;
    using Granule = sparge::Granule;
    static inline Sum broadcast(int32_t x) { return splat(x); }
    static inline Ints load_b(const Granule* p) { return *reinterpret_cast<const Ints*>(p); }
    static inline Ints load_a(Granule x) { return splat(x); }
    static inline Floats value(Sum sum) { return to_floats(sum); }
};
#endif

#if defined(SPARGE_INT8_DOT)
struct DotInt8 : DotInts {  // B is unsigned: codes + 128
    static inline Sum add(Sum sum, Ints a, Ints b) {
        return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(
            reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(b), reinterpret_cast<__m512i>(a)));
    }
};
#elif defined(SPARGE_INT16_DOT)
struct DotInt16 : DotInts {
    static inline Sum add(Sum sum, Ints a, Ints b) { return sum + dot_int16(a, b); }
};
#endif

#if defined(SPARGE_BF16_DOT)
struct DotBFloat16 {
    using Sum = Floats;
    using Granule = sparge::Granule;
    static inline Sum broadcast(float x) { return splat(x); }
    static inline Sum add(Sum sum, Ints a, Ints b) {
        return reinterpret_cast<Floats>(_mm512_dpbf16_ps(
            reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
    }
    static inline Ints load_b(const Granule* p) { return *reinterpret_cast<const Ints*>(p); }
    static inline Ints load_a(Granule x) {
        Ints all = splat(x);
#if defined(__clang__) && (__clang_major__ == 16 || __clang_major__ == 17)
        asm("" : "+v"(all));  // they crash on a broadcast that is used as bf16 (LLVM's issue 68117)
#endif
        return all;
    }
    static inline Floats value(Sum sum) { return sum; }
};
#endif

// The next smaller block, for the rows that are left.
constexpr int rows_after(int rows) { return rows > 4 ? 4 : rows / 2; }

// A[row][step] = data[row * row_stride + step * step_stride]
template <class Granule>
struct Operand {
    const Granule* data;
    ptrdiff_t row_stride;
    ptrdiff_t step_stride;
};

// Sums of ROWS rows and GROUP queries, kept in registers. `b` is [steps][ldb] granules; `sum` comes initialized.
template <class Dot, int ROWS>
inline __attribute__((always_inline)) void accumulate(
    typename Dot::Sum (&sum)[ROWS][VECTORS], Operand<typename Dot::Granule> a, const typename Dot::Granule* b,
    ptrdiff_t ldb, int steps) {
    for (int step = 0; step < steps; ++step) {
        decltype(Dot::load_b(b)) column[VECTORS];
        for (int v = 0; v < VECTORS; ++v) column[v] = Dot::load_b(b + v * LANES);
        for (int row = 0; row < ROWS; ++row) {
            auto scalar = Dot::load_a(a.data[row * a.row_stride]);
            for (int v = 0; v < VECTORS; ++v) sum[row][v] = Dot::add(sum[row][v], scalar, column[v]);
        }
        a.data += a.step_stride;
        b += ldb;
    }
}

// Scores of ROWS keys and GROUP queries: out[row][query] = product * factor[query] + offset[query]. `b` is Q's,
// [steps][Q_PITCH]; `start` (or null) is what each row's sum starts from. Raises maxima[query].
template <class Dot, int ROWS>
inline __attribute__((always_inline)) void score_block(
    Operand<typename Dot::Granule> a, const typename Dot::Granule* b, int steps, const int32_t* start,
    const float* factor, const float* offset, float* out, float* maxima) {
    typename Dot::Sum sum[ROWS][VECTORS];
    for (int row = 0; row < ROWS; ++row)
        for (int v = 0; v < VECTORS; ++v) sum[row][v] = Dot::broadcast(start ? start[row] : 0);
    accumulate<Dot, ROWS>(sum, a, b, Q_PITCH, steps);
    for (int v = 0; v < VECTORS; ++v) {
        Floats scale = load(factor + v * LANES), shift = load(offset + v * LANES), largest = load(maxima + v * LANES);
        for (int row = 0; row < ROWS; ++row) {
            Floats score = Dot::value(sum[row][v]) * scale + shift;
            store(out + row * GROUP + v * LANES, score);
            largest = maximum(score, largest);
        }
        store(maxima + v * LANES, largest);
    }
}

template <class Dot, int ROWS = BLOCK_ROWS>
void score_group(
    Operand<typename Dot::Granule> a, const typename Dot::Granule* b, int steps, const int32_t* start,
    const float* factor, const float* offset, int rows, float* out, float* maxima) {
    int row = 0;
    for (; row + ROWS <= rows; row += ROWS)
        score_block<Dot, ROWS>(
            {a.data + row * a.row_stride, a.row_stride, a.step_stride}, b, steps, start ? start + row : nullptr,
            factor, offset, out + row * GROUP, maxima);
    if constexpr (ROWS > 1)
        score_group<Dot, rows_after(ROWS)>(
            {a.data + row * a.row_stride, a.row_stride, a.step_stride}, b, steps, start ? start + row : nullptr,
            factor, offset, rows - row, out + row * GROUP, maxima);
}

// out[row][query] = out[row][query] * decay[query] + product, for `rows` channels and GROUP queries.
template <class Dot, int ROWS>
inline __attribute__((always_inline)) void value_block(
    Operand<typename Dot::Granule> a, const typename Dot::Granule* b, int steps, const float* decay, float* out) {
    Floats sum[ROWS][VECTORS];
    for (int row = 0; row < ROWS; ++row)
        for (int v = 0; v < VECTORS; ++v) {
            sum[row][v] = load(out + row * Q_TILE + v * LANES);
            if (decay) sum[row][v] *= load(decay + v * LANES);
        }
    accumulate<Dot, ROWS>(sum, a, b, GROUP, steps);
    for (int row = 0; row < ROWS; ++row)
        for (int v = 0; v < VECTORS; ++v) store(out + row * Q_TILE + v * LANES, sum[row][v]);
}

template <class Dot, int ROWS = BLOCK_ROWS>
void value_group(
    Operand<typename Dot::Granule> a, const typename Dot::Granule* b, int steps, const float* decay, int rows,
    float* out) {
    int row = 0;
    for (; row + ROWS <= rows; row += ROWS)
        value_block<Dot, ROWS>(
            {a.data + row * a.row_stride, a.row_stride, a.step_stride}, b, steps, decay, out + row * Q_TILE);
    if constexpr (ROWS > 1)
        value_group<Dot, rows_after(ROWS)>(
            {a.data + row * a.row_stride, a.row_stride, a.step_stride}, b, steps, decay, rows - row,
            out + row * Q_TILE);
}

}  // namespace sparge
