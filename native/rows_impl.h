// The bodies of rows.h's functions. Each rows_*.cpp defines the table's name WF_ROWS and includes this file.
//
// Everything here is local to that source file, and nothing of the C++ standard library is used, as in vector_impl.h. A
// remainder of less than a vector is filled up with zeros and worked out by the same operations as a whole vector.
#include <string.h>

#include "rows.h"

namespace wf {
namespace {

constexpr int W = 8;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint8_t bytes __attribute__((vector_size(W)));
typedef uint16_t halves __attribute__((vector_size(2 * W)));

constexpr int32_t SIGN = INT32_MIN;

template <class Vector, class T>
inline Vector load(const T* p, int n) {
    Vector v = {};
    if (n >= W)
        memcpy(&v, p, sizeof v);
    else
        memcpy(&v, p, sizeof(T) * static_cast<size_t>(n));
    return v;
}

template <class Vector, class T>
inline void store(T* p, Vector v, int n) {
    if (n >= W)
        memcpy(p, &v, sizeof v);
    else
        memcpy(p, &v, sizeof(T) * static_cast<size_t>(n));
}

inline vf floats(const float* p, int n) { return load<vf>(p, n); }
inline vi codes(const uint8_t* p, int n) { return __builtin_convertvector(load<bytes>(p, n), vi); }
inline void store_codes(uint8_t* p, vi v, int n) { store(p, __builtin_convertvector(v, bytes), n); }

inline vf all(float x) { return x - vf{}; }
inline vi bits(vf v) { return reinterpret_cast<vi>(v); }
inline vf number(vi v) { return reinterpret_cast<vf>(v); }
inline vf where(vi mask, vf v) { return number(mask & bits(v)); }  // v or 0
inline vf either(vi mask, vf yes, vf no) { return number((mask & bits(yes)) | (~mask & bits(no))); }
inline vf absolute(vf v) { return number(bits(v) & INT32_MAX); }
inline float sum(vf v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// A sum of units in the quadrant where both parts are positive.
struct Point {
    float re, im, half;  // half of its square modulus
    int32_t code;        // 2 bits for each stage
};

constexpr int MOST_POINTS = 1 << (2 * MOST_STAGES);

inline const float& scale(const wf_complex& c, int part, int stage, int axis, int row, int group) {
    const size_t before = static_cast<size_t>((part * c.stages + stage) * 2 + axis) * c.num_rows;
    return c.scales[(before + (c.num_rows == 1 ? 0 : row)) * c.num_groups + group];
}

// All sums that nearest codes are looked for among. Of sums that mirror each other in the axes one is listed: that in
// which the first unit of each axis is positive. The imaginary axis comes first, so that it wins a tie.
int list_points(const wf_complex& c, int part, int row, int group, Point* points) {
    int count = 0;
    for (int choice = 0; choice < 1 << (2 * c.stages); ++choice) {
        const int axes = ~(choice >> c.stages), signs = choice;
        float sums[2] = {0, 0};
        bool seen[2] = {false, false}, listed = true;
        for (int t = 0; t < c.stages && listed; ++t) {
            const int axis = axes >> (c.stages - 1 - t) & 1;
            const bool negative = signs >> (c.stages - 1 - t) & 1;
            listed = seen[axis] || !negative;
            seen[axis] = true;
            const float s = scale(c, part, t, axis, row, group);
            sums[axis] += negative ? -s : s;
        }
        if (!listed) continue;
        Point& point = points[count++];
        point.code = 0;
        for (int t = 0; t < c.stages; ++t) {
            const int axis = axes >> (c.stages - 1 - t) & 1;
            const int negative = (signs >> (c.stages - 1 - t) & 1) ^ static_cast<int>(sums[axis] < 0);
            point.code |= (axis | negative << 1) << (2 * t);
        }
        point.re = sums[0] < 0 ? -sums[0] : sums[0];
        point.im = sums[1] < 0 ? -sums[1] : sums[1];
        point.half = (point.re * point.re + point.im * point.im) / 2;
    }
    return count;
}

// The codes of all stages for entries re + i im, 2 bits for each.
inline vi nearest(const Point* points, int count, vf re, vf im) {
    const vf x = absolute(re), y = absolute(im);
    vf best = all(-__builtin_inff());
    vi code = {};
    for (int i = 0; i < count; ++i) {
        const vf score = (x * points[i].re + y * points[i].im) - points[i].half;
        const vi better = score > best;
        best = either(better, score, best);
        code = (better & points[i].code) | (~better & code);
    }
    const vi imaginary = (code & 0x55) << 1;  // the sign bits of units on the imaginary axis
    return code ^ ((re < 0) & (imaginary ^ 0xaa)) ^ ((im < 0) & imaginary);
}

inline vf factor(const wf_complex& c, int row, int k, int n) {
    return c.rows ? c.rows[row] * floats(c.columns + k, n) : all(1);
}

void complex_codes(const wf_complex& c, const float* weight, int begin, int end, uint8_t* index) {
    const int m = c.m, width = m / c.num_groups;
    const size_t plane = static_cast<size_t>(c.n) * m;
    Point points[2][MOST_POINTS];
    int count = 0;
    for (int row = begin; row < end; ++row) {
        const float* upper = weight + static_cast<size_t>(row) * 2 * m;
        const float* lower = upper + 2 * plane;
        for (int group = 0; group < c.num_groups; ++group) {
            if (row == begin || c.num_rows > 1 || c.num_groups > 1)
                for (int part = 0; part < 2; ++part) count = list_points(c, part, row, group, points[part]);
            for (int k = group * width; k < (group + 1) * width; k += W) {
                const int n = (group + 1) * width - k;
                const vf f = factor(c, row, k, n);
                const vf A = floats(upper + k, n) / f, B = floats(upper + m + k, n) / f;
                const vf C = floats(lower + k, n) / f, D = floats(lower + m + k, n) / f;
                const vi found[2] = {nearest(points[0], count, (A + D) / 2, (C - B) / 2),
                                     nearest(points[1], count, (A - D) / 2, (C + B) / 2)};
                for (int part = 0; part < 2; ++part)
                    for (int t = 0; t < c.stages; ++t)
                        store_codes(index + (part * c.stages + t) * plane + static_cast<size_t>(row) * m + k,
                                    (found[part] >> (2 * t)) & 3, n);
            }
        }
    }
}

// A unit times numbers: the sign of the unit, and on which axis it lies.
struct Unit {
    vi sign, imaginary;
    explicit Unit(vi code) : sign((code & 2) << 30), imaginary(-(code & 1)) {}
    vf times(vf v, int axis) const { return number((bits(v) ^ sign) & (axis ? imaginary : ~imaginary)); }
};

template <int T>
void weight_of(const wf_complex& c, const uint8_t* index, int begin, int end, float* weight) {
    const int m = c.m, width = m / c.num_groups;
    const size_t plane = static_cast<size_t>(c.n) * m;
    for (int row = begin; row < end; ++row) {
        float* upper = weight + static_cast<size_t>(row) * 2 * m;
        float* lower = upper + 2 * plane;
        for (int group = 0; group < c.num_groups; ++group)
            for (int k = group * width; k < (group + 1) * width; k += W) {
                const int n = (group + 1) * width - k;
                vf z[2][2] = {};
                for (int part = 0; part < 2; ++part)
                    for (int t = 0; t < T; ++t) {
                        const size_t at = (part * T + t) * plane + static_cast<size_t>(row) * m + k;
                        const Unit unit(codes(index + at, n));
                        for (int axis = 0; axis < 2; ++axis)
                            z[part][axis] += unit.times(all(scale(c, part, t, axis, row, group)), axis);
                    }
                const vf f = factor(c, row, k, n);
                store(upper + k, (z[0][0] + z[1][0]) * f, n);
                store(upper + m + k, (z[1][1] - z[0][1]) * f, n);
                store(lower + k, (z[0][1] + z[1][1]) * f, n);
                store(lower + m + k, (z[0][0] - z[1][0]) * f, n);
            }
    }
}

void complex_weight(const wf_complex& c, const uint8_t* index, int begin, int end, float* weight) {
    switch (c.stages) {
        case 1: return weight_of<1>(c, index, begin, end, weight);
        case 2: return weight_of<2>(c, index, begin, end, weight);
        case 3: return weight_of<3>(c, index, begin, end, weight);
        default: return weight_of<4>(c, index, begin, end, weight);
    }
}

template <int T>
void gradient_of(const wf_complex& c, const uint8_t* index, const float* gradient, int begin, int end,
                 const ComplexSums& sums) {
    const int m = c.m, width = m / c.num_groups;
    const size_t plane = static_cast<size_t>(c.n) * m;
    for (int row = begin; row < end; ++row) {
        const float* upper = gradient + static_cast<size_t>(row) * 2 * m;
        const float* lower = upper + 2 * plane;
        vf along = {};
        for (int group = 0; group < c.num_groups; ++group) {
            vf totals[2][T][2] = {};
            for (int k = group * width; k < (group + 1) * width; k += W) {
                const int n = (group + 1) * width - k;
                const vf A = floats(upper + k, n), B = floats(upper + m + k, n);
                const vf C = floats(lower + k, n), D = floats(lower + m + k, n);
                const vf dz[2][2] = {{A + D, C - B}, {A - D, C + B}};
                const vf f = factor(c, row, k, n);
                vf products = {};
                for (int part = 0; part < 2; ++part) {
                    vf z[2] = {};
                    for (int t = 0; t < T; ++t) {
                        const size_t at = (part * T + t) * plane + static_cast<size_t>(row) * m + k;
                        const Unit unit(codes(index + at, n));
                        for (int axis = 0; axis < 2; ++axis) {
                            z[axis] += unit.times(all(scale(c, part, t, axis, row, group)), axis);
                            totals[part][t][axis] += unit.times(dz[part][axis] * f, axis);
                        }
                    }
                    products += dz[part][0] * z[0] + dz[part][1] * z[1];
                }
                if (!c.rows) continue;
                along += products * floats(c.columns + k, n);
                store(sums.columns + k, floats(sums.columns + k, n) + products * c.rows[row], n);
            }
            for (int part = 0; part < 2; ++part)
                for (int t = 0; t < T; ++t)
                    for (int axis = 0; axis < 2; ++axis) {
                        const size_t before = static_cast<size_t>((part * T + t) * 2 + axis) * c.num_rows;
                        const int own = c.num_rows == 1 ? 0 : row;
                        sums.scales[(before + own) * c.num_groups + group] += sum(totals[part][t][axis]);
                    }
        }
        if (c.rows) sums.rows[row] = sum(along);
    }
}

void complex_gradient(const wf_complex& c, const uint8_t* index, const float* gradient, int begin, int end,
                      const ComplexSums& sums) {
    switch (c.stages) {
        case 1: return gradient_of<1>(c, index, gradient, begin, end, sums);
        case 2: return gradient_of<2>(c, index, gradient, begin, end, sums);
        case 3: return gradient_of<3>(c, index, gradient, begin, end, sums);
        default: return gradient_of<4>(c, index, gradient, begin, end, sums);
    }
}

constexpr float SMALLEST = 1e-8f;  // of methods/anemll/lowrank.py

inline vf guarded(vf s) { return either(absolute(s) < SMALLEST, either(s < 0, all(-SMALLEST), all(SMALLEST)), s); }

void table_codes(const wf_table& t, const float* weight, size_t begin, size_t count, uint8_t* index) {
    float middles[15];
    for (int i = 0; i + 1 < t.size; ++i) middles[i] = (t.table[i + 1] + t.table[i]) / 2;
    for (size_t done = 0; done < count; done += W) {
        const int n = count - done < W ? static_cast<int>(count - done) : W;
        const vf ratio = floats(weight + begin + done, n) / guarded(floats(t.scales + begin + done, n));
        vi code = {};
        for (int i = 0; i + 1 < t.size; ++i) code -= ratio > middles[i];
        store_codes(index + begin + done, code, n);
    }
}

void table_weight(const wf_table& t, const uint8_t* index, size_t begin, size_t count, float* weight) {
    for (size_t done = 0; done < count; done += W) {
        const int n = count - done < W ? static_cast<int>(count - done) : W;
        const vi code = codes(index + begin + done, n);
        vf value = all(t.table[0]);
        for (int i = 1; i < t.size; ++i) value = either(code >= i, all(t.table[i]), value);
        store(weight + begin + done, value * floats(t.scales + begin + done, n), n);
    }
}

template <int SIZE>
void table_gradient_of(const wf_table& t, const float* weight, const float* gradient, size_t begin, size_t count,
                       float* to_weight, float* to_scales, float* to_table) {
    vf totals[SIZE] = {};
    for (size_t done = 0; done < count; done += W) {
        const int n = count - done < W ? static_cast<int>(count - done) : W;
        const vf s = floats(t.scales + begin + done, n), g = floats(gradient + begin + done, n);
        const vf ratio = floats(weight + begin + done, n) / guarded(s);
        const vf product = g * s;
        vf value = all(t.table[0]);
        vi above = vi{} - 1;
        for (int i = 0; i + 1 < SIZE; ++i) {
            const vi next = ratio > (t.table[i + 1] + t.table[i]) / 2;
            totals[i] += where(above & ~next, product);
            value = either(next, all(t.table[i + 1]), value);
            above = next;
        }
        totals[SIZE - 1] += where(above, product);
        const vi inside = absolute(ratio) <= t.table[SIZE - 1];
        store(to_weight + begin + done, where(inside, g), n);
        store(to_scales + begin + done, g * value - g * where(inside, ratio), n);
    }
    for (int i = 0; i < SIZE; ++i) to_table[i] = sum(totals[i]);
}

void table_gradient(const wf_table& t, const float* weight, const float* gradient, size_t begin, size_t count,
                    float* to_weight, float* to_scales, float* to_table) {
    switch (t.size) {
        case 4: return table_gradient_of<4>(t, weight, gradient, begin, count, to_weight, to_scales, to_table);
        case 8: return table_gradient_of<8>(t, weight, gradient, begin, count, to_weight, to_scales, to_table);
        default: return table_gradient_of<16>(t, weight, gradient, begin, count, to_weight, to_scales, to_table);
    }
}

inline vf widened(const uint16_t* p, int n) { return number(__builtin_convertvector(load<halves>(p, n), vi) << 16); }
inline vf widened(const float* p, int n) { return floats(p, n); }

inline void narrow(uint16_t* p, vf v, int n) {  // to the nearest, ties to even
    const vu b = reinterpret_cast<vu>(v);
    store(p, __builtin_convertvector((b + 0x7fff + ((b >> 16) & 1)) >> 16, halves), n);
}
inline void narrow(float* p, vf v, int n) { store(p, v, n); }

template <class T>
void rounded(const void* from, int k, void* to) {
    const T* x = static_cast<const T*>(from);
    T* y = static_cast<T*>(to);
    vi largest = {};  // as whole numbers, in which infinity and NaN are larger than every finite number
    for (int i = 0; i < k; i += W) {
        const vi v = bits(widened(x + i, k - i)) & INT32_MAX;
        largest = ((v > largest) & v) | (~(v > largest) & largest);
    }
    int32_t top = 0;
    for (int lane = 0; lane < W; ++lane) top = largest[lane] > top ? largest[lane] : top;
    float most;
    memcpy(&most, &top, sizeof most);
    const bool finite = top < 0x7f800000;
    const float scale = 1 / (most < 1e-5f ? 1e-5f : most) * 127;  // in the order in which torch computes 127 / x
    const float shift = 12582912.0f;                              // 1.5 * 2^23: adding it rounds to a whole number
    for (int i = 0; i < k; i += W) {
        const vf v = widened(x + i, k - i) * scale;
        const vf whole = number(bits((v + shift) - shift) | (bits(v) & SIGN));  // -0.3 becomes -0
        narrow(y + i, finite ? whole / scale : number(vi{} + 0x7fc00000), k - i);
    }
}

const RowLoops LOOPS = {complex_codes, complex_weight, complex_gradient, table_codes,
                        table_weight,  table_gradient, rounded<float>,   rounded<uint16_t>};

}  // namespace

const RowLoops& WF_ROWS() { return LOOPS; }

}  // namespace wf
