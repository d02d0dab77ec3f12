// AVX-512 with VNNI: 4 rows in a register, bytes multiplied unsigned by signed.
#include <immintrin.h>

#include "kernels.h"

namespace wf {
namespace {

struct V {
    static constexpr int ROWS = 4, ZERO = 128, NUM_ROWS = 2, MOST_SUMS = 16, CHAINS = 16, PAIRS = 0;
    using Bytes = __m512i;
    using Sums = __m512i;
    using Floats = __m512;
    static Bytes load(const void* from) { return _mm512_load_si512(from); }
    static Bytes cell(const void* from) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(from)));
    }
    static Bytes splat(int8_t value) { return _mm512_set1_epi8(value); }
    static Bytes bit_and(Bytes x, Bytes y) { return _mm512_and_si512(x, y); }
    static Bytes add(Bytes x, Bytes y) { return _mm512_add_epi8(x, y); }
    static Bytes sub(Bytes x, Bytes y) { return _mm512_sub_epi8(x, y); }
    template <int BITS>
    static Bytes shift(Bytes x) {
        return _mm512_srli_epi16(x, BITS);
    }
    static Bytes shuffle(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }
    static Sums zero() { return _mm512_setzero_si512(); }
    static Sums plus(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
    static Sums dot(Sums sums, Bytes w, Bytes x) {
#if defined(__GNUC__) && !defined(__clang__)
        // GCC 12 copies every sum around the intrinsic.
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(w), "v"(x));
        return sums;
#else
        return _mm512_dpbusd_epi32(sums, w, x);
#endif
    }
    static Sums dot_codes(Sums sums, Bytes w, Bytes x) { return dot(sums, w, x); }
    static Sums minus(Sums a, Sums b) { return _mm512_sub_epi32(a, b); }
    static Sums times(Sums a, int factor) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(factor)); }
    static Sums lanes(const int32_t* from) { return cell(from); }
    static Floats floats(Sums a) { return _mm512_cvtepi32_ps(a); }
    static Floats all(float value) { return _mm512_set1_ps(value); }
    static Floats rows(const float* from) {
        const __m512i row = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        return _mm512_permutexvar_ps(row, _mm512_broadcast_f32x4(_mm_loadu_ps(from)));
    }
    static Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static void store_row(Floats a, float* to) {
        a = _mm512_add_ps(a, _mm512_shuffle_ps(a, a, _MM_SHUFFLE(2, 3, 0, 1)));
        a = _mm512_add_ps(a, _mm512_shuffle_ps(a, a, _MM_SHUFFLE(1, 0, 3, 2)));
        const __m512i row = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_permutexvar_ps(row, a)));
    }
    template <int N>
    static void store_rows(const Floats (&a)[N], float* to) {
        for (int i = 0; i < N; ++i) store_row(a[i], to + i * ROWS);
    }
    static void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); }
};

#include "kernels.inc"

}  // namespace

const Kernels avx512_kernels = {"avx512-vnni", product, nullptr, quantize, sum, dot, dot_bf16};

}  // namespace wf
