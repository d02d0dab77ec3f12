// Any processor: a register is an array of 16 bytes, one row. This is also the plainest description of what each
// function of a register type does.
#include "kernels.h"

namespace wf {
namespace {

struct V {
    static constexpr int ROWS = 1, ZERO = 0, NUM_ROWS = 1, MOST_SUMS = 4, CHAINS = 4, PAIRS = 0;
    struct Bytes {
        uint8_t at[CELL];
    };
    struct Sums {
        int32_t at[4];
    };
    struct Floats {
        float at[4];
    };
    static Bytes load(const void* from) {
        Bytes x;
        std::memcpy(x.at, from, CELL);
        return x;
    }
    static Bytes cell(const void* from) { return load(from); }
    static Bytes splat(int8_t value) {
        Bytes x;
        std::memset(x.at, value, CELL);
        return x;
    }
    static Bytes bit_and(Bytes x, const Bytes& y) {
        for (int i = 0; i < CELL; ++i) x.at[i] = x.at[i] & y.at[i];
        return x;
    }
    static Bytes add(Bytes x, const Bytes& y) {
        for (int i = 0; i < CELL; ++i) x.at[i] = static_cast<uint8_t>(x.at[i] + y.at[i]);
        return x;
    }
    static Bytes sub(Bytes x, const Bytes& y) {
        for (int i = 0; i < CELL; ++i) x.at[i] = static_cast<uint8_t>(x.at[i] - y.at[i]);
        return x;
    }
    template <int BITS>
    static Bytes shift(Bytes x) {
        for (int i = 0; i < CELL; ++i) x.at[i] = static_cast<uint8_t>(x.at[i] >> BITS);
        return x;
    }
    static Bytes shuffle(const Bytes& table, const Bytes& index) {
        Bytes x;
        for (int i = 0; i < CELL; ++i) x.at[i] = index.at[i] & 0x80 ? 0 : table.at[index.at[i] & 15];
        return x;
    }
    static Sums zero() { return {}; }
    static Sums plus(Sums a, const Sums& b) {
        for (int i = 0; i < 4; ++i) a.at[i] += b.at[i];
        return a;
    }
    static Sums dot(Sums sums, const Bytes& w, const Bytes& x) {
        for (int i = 0; i < CELL; ++i) sums.at[i / 4] += static_cast<int8_t>(w.at[i]) * static_cast<int8_t>(x.at[i]);
        return sums;
    }
    static Sums dot_codes(Sums sums, const Bytes& w, const Bytes& x) { return dot(sums, w, x); }
    static Sums minus(Sums a, const Sums& b) {
        for (int i = 0; i < 4; ++i) a.at[i] -= b.at[i];
        return a;
    }
    static Sums times(Sums a, int factor) {
        for (int i = 0; i < 4; ++i) a.at[i] *= factor;
        return a;
    }
    static Sums lanes(const int32_t* from) {
        Sums a;
        std::memcpy(a.at, from, sizeof(a.at));
        return a;
    }
    static Floats floats(const Sums& a) {
        Floats x;
        for (int i = 0; i < 4; ++i) x.at[i] = static_cast<float>(a.at[i]);
        return x;
    }
    static Floats all(float value) { return {{value, value, value, value}}; }
    static Floats rows(const float* from) { return all(*from); }
    static Floats plus(Floats a, const Floats& b) {
        for (int i = 0; i < 4; ++i) a.at[i] += b.at[i];
        return a;
    }
    static Floats times(Floats a, const Floats& b) {
        for (int i = 0; i < 4; ++i) a.at[i] *= b.at[i];
        return a;
    }
    template <int N>
    static void store_rows(const Floats (&a)[N], float* to) {
        for (int i = 0; i < N; ++i) to[i] = (a[i].at[0] + a[i].at[1]) + (a[i].at[2] + a[i].at[3]);
    }
    static void prefetch(const void*) {}
};

#include "kernels.inc"

}  // namespace

const Kernels generic_kernels = {"generic", product, nullptr, quantize, sum, dot, dot_bf16};

}  // namespace wf
