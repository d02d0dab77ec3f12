// Chooses among the compiled versions of vector.h's loops: the one that goes with the kernels in use.
#include "vector.h"

#include <cstring>

#include "kernels.h"
#include "wf.h"

namespace wf {

const Vectors& vectors() {
#if defined(__x86_64__) || defined(_M_X64)
    static const bool avx512 = std::strncmp(kernels().name, "avx512", 6) == 0;
    static const bool avx = std::strncmp(kernels().name, "avx", 3) == 0;
    if (avx512) return vectors_avx512();
    if (avx) return vectors_avx2();
#endif
    return vectors_generic();
}

}  // namespace wf

extern "C" int wf_norm(const float* x, const float* gain, float eps, int batch, int k, float* y) {
    return wf::guarded(1, [&] {
        wf::check(x && gain && y && batch >= 0 && k >= 1 && eps >= 0, "norm: an argument is missing, or no size");
        for (int row = 0; row < batch; ++row)
            wf::vectors().norm(x + static_cast<size_t>(row) * k, gain, eps, k, y + static_cast<size_t>(row) * k);
        return 0;
    });
}
