// Chooses the kernels for this processor, and keeps the text of the last error.
#include <cstdlib>

#include "kernels.h"
#include "wf.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace wf {

namespace {

thread_local std::string last_error;

#if defined(__x86_64__) || defined(_M_X64)
struct Features {
    bool avx2, avxvnni, avx512;
};
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
void cpuid(int leaf, int sub, uint32_t (&r)[4]) { __cpuidex(reinterpret_cast<int*>(r), leaf, sub); }
uint64_t saved_state() { return _xgetbv(0); }
#else
#include <cpuid.h>
void cpuid(int leaf, int sub, uint32_t (&r)[4]) { __cpuid_count(leaf, sub, r[0], r[1], r[2], r[3]); }
uint64_t saved_state() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}
#endif

bool bit(uint32_t word, int index) { return word >> index & 1; }

// A set counts if the processor has its instructions and the system saves its registers.
Features features() {
    uint32_t one[4], seven[4] = {}, more[4] = {}, top[4];
    cpuid(0, 0, top);
    cpuid(1, 0, one);
    if (top[0] < 7 || !bit(one[2], 27)) return {};  // no OSXSAVE: the system saves none of these registers
    const uint64_t state = saved_state();
    cpuid(7, 0, seven);
    if (seven[0] >= 1) cpuid(7, 1, more);
    const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6;
    const bool avx2 = ymm && bit(seven[1], 5) && bit(one[2], 12);  // AVX2, FMA
    const bool avx512 = avx2 && zmm && bit(seven[1], 16) && bit(seven[1], 17) && bit(seven[1], 30) &&
                        bit(seven[1], 31) && bit(seven[2], 11);  // F, DQ, BW, VL, VNNI
    return {avx2, avx2 && bit(more[0], 4), avx512};
}

std::vector<const Kernels*> present() {
    const Features has = features();
    std::vector<const Kernels*> list;
    if (has.avx512) list.push_back(&avx512_kernels);
    if (has.avxvnni) list.push_back(&avxvnni_kernels);
    if (has.avx2) list.push_back(&avx2_kernels);
    list.push_back(&generic_kernels);
    return list;
}
#elif defined(__aarch64__) || defined(_M_ARM64)
bool has_dot_products() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true;  // every ARM processor that runs macOS or Windows has them
#endif
}

std::vector<const Kernels*> present() {
    if (has_dot_products()) return {&neon_kernels, &generic_kernels};
    return {&generic_kernels};
}
#else
std::vector<const Kernels*> present() { return {&generic_kernels}; }
#endif

const Kernels& choose() {
    const std::vector<const Kernels*> list = present();
    const char* wanted = std::getenv("WF_ISA");
    if (!wanted || !*wanted) return *list.front();
    std::string names;
    for (const Kernels* kernels : list) {
        if (kernels->name == std::string(wanted)) return *kernels;
        names += (names.empty() ? "" : ", ") + std::string(kernels->name);
    }
    fail("WF_ISA=" + std::string(wanted) + ": not on this machine; it has " + names);
}

}  // namespace

void set_error(const std::string& text) { last_error = text; }

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace wf

extern "C" {

int wf_abi(void) { return WF_ABI; }

const char* wf_isa(void) {
    return wf::guarded<const char*>(nullptr, [] { return wf::kernels().name; });
}

const char* wf_error(void) { return wf::last_error.c_str(); }

}  // extern "C"
