// AVX2, which has no dot products of bytes. Pairs of products are added up in int16: with |w| <= 128 and |x| <= 127
// they do not overflow.
#include <immintrin.h>

#include "kernels.h"

namespace wf {
namespace {

#include "avx2.inc"

struct V : Registers {
    static constexpr int NUM_ROWS = 4, ZERO = 0, PAIRS = 32767;
    static Sums dot(Sums sums, Bytes w, Bytes x) { return dot_codes(sums, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w)); }
    static Sums dot_codes(Sums sums, Bytes w, Bytes x) {
        const __m256i pairs = _mm256_maddubs_epi16(w, x);
        return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static Sums dot_pairs(Sums pairs, Bytes w, Bytes x) { return _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w, x)); }
    static Sums plus_pairs(Sums sums, Sums pairs) {
        return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
};

#include "kernels.inc"
#include "planes.inc"

void product_or_planes(const Job& job, int begin, int end) {
    const bool planes = job.matrix.streams[job.stream].columns.planes;
    planes ? plane_panels(job, begin, end) : product(job, begin, end);
}

}  // namespace

const Kernels avx2_kernels = {"avx2", product_or_planes, tables, quantize, sum, dot, dot_bf16};

}  // namespace wf
