// AVX-VNNI: dot products of bytes, unsigned by signed, in 256-bit registers.
#include <immintrin.h>

#include "kernels.h"

namespace wf {
namespace {

#include "avx2.inc"

struct V : Registers {
    static constexpr int ZERO = 128;
    static Sums dot(Sums sums, Bytes w, Bytes x) {
#if defined(__GNUC__) && !defined(__clang__)
        // GCC 12 copies every sum around the intrinsic.
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(w), "x"(x));
        return sums;
#else
        return _mm256_dpbusd_avx_epi32(sums, w, x);
#endif
    }
    static Sums dot_codes(Sums sums, Bytes w, Bytes x) { return dot(sums, w, x); }
};

#include "kernels.inc"

}  // namespace

const Kernels avxvnni_kernels = {"avx-vnni", product, nullptr, quantize, sum, dot, dot_bf16};

}  // namespace wf
