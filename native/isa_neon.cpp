// NEON with dot products (ARMv8.2 and every Apple chip): 1 row in a register, bytes multiplied signed.
#include <arm_neon.h>

#include "kernels.h"

namespace wf {
namespace {

struct V {
    static constexpr int ROWS = 1, ZERO = 0, NUM_ROWS = 4, MOST_SUMS = 16, CHAINS = 8, PAIRS = 0;
    using Bytes = uint8x16_t;
    using Sums = int32x4_t;
    using Floats = float32x4_t;
    static Bytes load(const void* from) { return vld1q_u8(static_cast<const uint8_t*>(from)); }
    static Bytes cell(const void* from) { return load(from); }
    static Bytes splat(int8_t value) { return vdupq_n_u8(static_cast<uint8_t>(value)); }
    static Bytes bit_and(Bytes x, Bytes y) { return vandq_u8(x, y); }
    static Bytes add(Bytes x, Bytes y) { return vaddq_u8(x, y); }
    static Bytes sub(Bytes x, Bytes y) { return vsubq_u8(x, y); }
    template <int BITS>
    static Bytes shift(Bytes x) {
        return vshrq_n_u8(x, BITS);
    }
    static Bytes shuffle(Bytes table, Bytes index) { return vqtbl1q_u8(table, index); }
    static Sums zero() { return vdupq_n_s32(0); }
    static Sums plus(Sums a, Sums b) { return vaddq_s32(a, b); }
    static Sums dot(Sums sums, Bytes w, Bytes x) {
        return vdotq_s32(sums, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x));
    }
    static Sums dot_codes(Sums sums, Bytes w, Bytes x) { return dot(sums, w, x); }
    static Sums minus(Sums a, Sums b) { return vsubq_s32(a, b); }
    static Sums times(Sums a, int factor) { return vmulq_n_s32(a, factor); }
    static Sums lanes(const int32_t* from) { return vld1q_s32(from); }
    static Floats floats(Sums a) { return vcvtq_f32_s32(a); }
    static Floats all(float value) { return vdupq_n_f32(value); }
    static Floats rows(const float* from) { return vdupq_n_f32(*from); }
    static Floats plus(Floats a, Floats b) { return vaddq_f32(a, b); }
    static Floats times(Floats a, Floats b) { return vmulq_f32(a, b); }
    template <int N>
    static void store_rows(const Floats (&a)[N], float* to) {
        for (int i = 0; i < N; ++i) to[i] = vaddvq_f32(a[i]);  // (0 + 1) + (2 + 3), as everywhere
    }
    static void prefetch(const void* at) { __builtin_prefetch(at); }
};

#include "kernels.inc"

}  // namespace

const Kernels neon_kernels = {"neon-dotprod", product, nullptr, quantize, sum, dot, dot_bf16};

}  // namespace wf
