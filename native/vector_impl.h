// The bodies of vector.h's functions, for vectors of WF_WIDTH floats. Each vector_*.cpp defines WF_WIDTH, the table's
// name WF_VECTORS and its text WF_NAME, and includes this file.
//
// Everything here is local to that source file, and nothing of the C++ standard library is used. The linker keeps one
// copy of an inline function for all files: if it kept one that was compiled for AVX-512, other processors would crash.
//
// A remainder of less than a vector is filled up with zeros and worked out by the same operations as a whole vector.
#include <string.h>

#include "vector.h"

namespace wf {
namespace {

constexpr int W = WF_WIDTH;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));

inline int least(int a, int b) { return a < b ? a : b; }

inline vf load(const float* p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

inline vf load_part(const float* p, int n) {
    vf v = {};
    memcpy(&v, p, 4 * n);
    return v;
}

inline vf load_some(const float* p, int n) { return n >= W ? load(p) : load_part(p, n); }

inline void store_some(float* p, vf v, int n) {
    if (n >= W)
        store(p, v);
    else
        memcpy(p, &v, 4 * n);
}

inline vf all(float x) { return x - vf{}; }

inline vf larger(vf a, vf b) { return a > b ? a : b; }

// The vector with each lane exchanged for the one at a distance of 1, 2, 4 or 8.
#if WF_WIDTH == 16
inline vf across(vf v, int distance) {
    return distance == 8   ? __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
           : distance == 4 ? __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
           : distance == 2 ? __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
                           : __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}
#elif WF_WIDTH == 8
inline vf across(vf v, int distance) {
    return distance == 4   ? __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3)
           : distance == 2 ? __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5)
                           : __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
}
#else
inline vf across(vf v, int distance) {
    return distance == 2 ? __builtin_shufflevector(v, v, 2, 3, 0, 1) : __builtin_shufflevector(v, v, 1, 0, 3, 2);
}
#endif

inline float sum(vf v) {
    for (int distance = W / 2; distance; distance /= 2) v += across(v, distance);
    return v[0];
}

inline float largest(vf v) {
    for (int distance = W / 2; distance; distance /= 2) v = larger(v, across(v, distance));
    return v[0];
}

// e^x, within 2 units in the last place, for x from -86 to 88; other x count as the nearer end. The constants are those
// of expf in the Cephes library.
inline vf exponential(vf x) {
    x = x < -86.0f ? all(-86.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, which is then in the low bits
    vf moved = x * 1.44269504f + shift;
    vf whole = moved - shift;
    vf r = x - whole * 0.693359375f;
    r = r + whole * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi power = reinterpret_cast<vi>(moved) << 23;  // moves the whole number to the exponent, and all other bits out
    return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + power);
}

float exponential_of(float x) { return exponential(all(x))[0]; }

void norm(const float* x, const float* gain, float eps, int n, float* y) {
    vf squares = {};
    for (int i = 0; i < n; i += W) {
        vf v = load_some(x + i, n - i);
        squares += v * v;
    }
    float inverse = 1.0f / __builtin_sqrtf(sum(squares) / n + eps);
    for (int i = 0; i < n; i += W)
        store_some(y + i, load_some(x + i, n - i) * inverse * load_some(gain + i, n - i), n - i);
}

void add(const float* x, int n, float* y) {
    for (int i = 0; i < n; i += W) store_some(y + i, load_some(y + i, n - i) + load_some(x + i, n - i), n - i);
}

void add_times(const float* x, float factor, int n, float* y) {
    for (int i = 0; i < n; i += W) store_some(y + i, load_some(y + i, n - i) + load_some(x + i, n - i) * factor, n - i);
}

void layer_norm(const float* x, const float* gain, const float* shift, float eps, int n, float* y) {
    vf total = {}, squares = {};
    for (int i = 0; i < n; i += W) total += load_some(x + i, n - i);
    float means[W];
    store(means, all(sum(total) / n));
    const auto centred = [&](int i) { return load_some(x + i, n - i) - load_some(means, n - i); };
    for (int i = 0; i < n; i += W) squares += centred(i) * centred(i);
    const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / n + eps);
    for (int i = 0; i < n; i += W) {
        vf v = centred(i) * inverse * load_some(gain + i, n - i);
        store_some(y + i, shift ? v + load_some(shift + i, n - i) : v, n - i);
    }
}

template <class F>
inline void times(const F& act, const float* gate, const float* up, int n, float* y) {
    for (int i = 0; i < n; i += W) {
        vf g = act(load_some(gate + i, n - i));
        store_some(y + i, up ? g * load_some(up + i, n - i) : g, n - i);
    }
}

void silu_times(const float* gate, const float* up, int n, float* y) {
    times([](vf g) { return g / (1.0f + exponential(-g)); }, gate, up, n, y);
}

void relu2_times(const float* gate, const float* up, int n, float* y) {
    const auto act = [](vf g) {
        vf above = larger(g, vf{});
        return above * above;
    };
    times(act, gate, up, n, y);
}

// g (1 + tanh u) / 2 is g / (1 + exp(-2 u)), with u = sqrt(2 / pi) (g + 0.044715 g^3).
void gelu_times(const float* gate, const float* up, int n, float* y) {
    const auto act = [](vf g) { return g / (1.0f + exponential(g * (g * g * 0.044715f + 1.0f) * -1.5957691216f)); };
    times(act, gate, up, n, y);
}

void round8(const float* x, int n, float* y) {
    vf most = {};
    for (int i = 0; i < n; i += W) {
        vf v = load_some(x + i, n - i);
        most = larger(most, larger(v, -v));
    }
    float peak = largest(most);
    float scale = 127.0f / (peak > 1e-5f ? peak : 1e-5f);
    const float shift = 12582912.0f;
    for (int i = 0; i < n; i += W) {
        vf scaled = load_some(x + i, n - i) * scale;
        vf whole = (scaled + shift) - shift;
        store_some(y + i, (whole > 127.0f ? all(127.0f) : whole) / scale, n - i);
    }
}

// -1 in the lanes that are the later ones of a pair at this distance, 1 in the others.
inline vf later(int distance) {
    vf signs = all(1.0f);
    for (int lane = 0; lane < W; lane++)
        if (lane & distance) signs[lane] = -1.0f;
    return signs;
}

// Sums and differences of pairs at a distance, which is a power of 2, for all n numbers.
void butterflies(int n, int distance, float* y) {
    if (distance >= W) {
        for (int start = 0; start < n; start += 2 * distance)
            for (int i = start; i < start + distance; i += W) {
                vf a = load(y + i), b = load(y + i + distance);
                store(y + i, a + b);
                store(y + i + distance, a - b);
            }
        return;
    }
    int i = 0;
    for (const vf signs = later(distance); i + W <= n; i += W) {
        vf v = load(y + i);
        store(y + i, across(v, distance) + signs * v);
    }
    for (; i < n; i += 2 * distance)
        for (int j = i; j < i + distance; j++) {
            float a = y[j], b = y[j + distance];
            y[j] = a + b;
            y[j + distance] = a - b;
        }
}

void hadamard(const float* x, const float* signs, int n, int block, float* y) {
    for (int i = 0; i < n; i += W) store_some(y + i, load_some(x + i, n - i) * load_some(signs + i, n - i), n - i);
    for (int distance = 1; distance < block; distance *= 2) butterflies(n, distance, y);
}

void rotate(const float* cosine, const float* sine, int half, float* x) {
    for (int i = 0; i < half; i += W) {
        int n = half - i;
        vf a = load_some(x + i, n), b = load_some(x + half + i, n), c = load_some(cosine + i, n),
           s = load_some(sine + i, n);
        store_some(x + i, a * c - b * s, n);
        store_some(x + half + i, b * c + a * s, n);
    }
}

inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

constexpr int AHEAD = 2048;  // bytes from the load to the prefetch; keys, and then values, of a page lie in one piece

// A matrix of rows of `stride` elements. Rows 2 pair and 2 pair + 1 of bf16 share words of 32 bits, the first in the
// low half: so one load and two operations give vectors of floats of both rows.
inline void put(float* rows, int row, int stride, int at, float x) { rows[static_cast<size_t>(row) * stride + at] = x; }
inline void put(uint16_t* rows, int row, int stride, int at, float x) {
    rows[(static_cast<size_t>(row / 2) * stride + at) * 2 + row % 2] = to_bf16(x);
}

inline void load_pair(const float* rows, int pair, int stride, int at, vf& first, vf& second) {
    first = load(rows + static_cast<size_t>(2 * pair) * stride + at);
    second = load(rows + static_cast<size_t>(2 * pair + 1) * stride + at);
}
inline void load_pair(const uint16_t* rows, int pair, int stride, int at, vf& first, vf& second) {
    vu words;
    const uint16_t* from = rows + (static_cast<size_t>(pair) * stride + at) * 2;
    __builtin_prefetch(reinterpret_cast<const char*>(from) + AHEAD);
    memcpy(&words, from, sizeof words);
    first = reinterpret_cast<vf>(words << 16);
    second = reinterpret_cast<vf>(words & 0xffff0000u);
}

template <class S>
void store_key_as(const float* x, int head_dim, int place, S* tiles) {
    S* tile = tiles + static_cast<size_t>(place / SIDE) * head_dim * SIDE;
    for (int d = 0; d < head_dim; d++) put(tile, d, SIDE, place % SIDE, x[d]);
}

void store_key(const float* x, int head_dim, int bf16, int place, void* tiles) {
    if (bf16)
        store_key_as(x, head_dim, place, static_cast<uint16_t*>(tiles));
    else
        store_key_as(x, head_dim, place, static_cast<float*>(tiles));
}

template <class S>
void store_value_as(const float* x, int head_dim, int padded_dim, int place, S* rows) {
    for (int d = 0; d < head_dim; d++) put(rows, place, padded_dim, d, x[d]);
}

void store_value(const float* x, int head_dim, int padded_dim, int bf16, int place, void* rows) {
    if (bf16)
        store_value_as(x, head_dim, padded_dim, place, static_cast<uint16_t*>(rows));
    else
        store_value_as(x, head_dim, padded_dim, place, static_cast<float*>(rows));
}

constexpr int PARTS = SIDE / W;            // vectors in a tile
constexpr int TOGETHER = W == 16 ? 4 : 2;  // so many queries times so many tiles have their sums in registers

// Products of Q queries and the keys of T tiles of 16 positions: out [Q][PAGE].
template <int Q, int T, class S>
inline void score(const float* q, int head_dim, const S* keys, float* out) {
    vf acc[Q][T * PARTS] = {};
    for (int pair = 0; pair < head_dim / 2; pair++)
        for (int v = 0; v < T * PARTS; v++) {
            vf a, b;
            load_pair(keys + static_cast<size_t>(v / PARTS) * head_dim * SIDE, pair, SIDE, v % PARTS * W, a, b);
            for (int i = 0; i < Q; i++) acc[i][v] += q[i * head_dim + 2 * pair] * a;
            for (int i = 0; i < Q; i++) acc[i][v] += q[i * head_dim + 2 * pair + 1] * b;
        }
    for (int i = 0; i < Q; i++)
        for (int v = 0; v < T * PARTS; v++) store(out + i * PAGE + v * W, acc[i][v]);
}

template <int Q, class S>
void score_tiles(const float* q, int head_dim, const S* keys, int num_tiles, float* out) {
    int t = 0;
    for (; t + TOGETHER <= num_tiles; t += TOGETHER)
        score<Q, TOGETHER>(q, head_dim, keys + static_cast<size_t>(t) * head_dim * SIDE, out + t * SIDE);
    for (; t < num_tiles; t++)
        score<Q, 1>(q, head_dim, keys + static_cast<size_t>(t) * head_dim * SIDE, out + t * SIDE);
}

// out[i][C vectors] = out[i] * keep[i] + sum_j p[i][j] values[j].
template <int Q, int C, class S>
inline void blend(const float* p, const float* keep, const S* values, int at, int num, int padded_dim, float* out) {
    vf acc[Q][C];
    for (int i = 0; i < Q; i++)
        for (int c = 0; c < C; c++) acc[i][c] = load(out + i * padded_dim + c * W) * keep[i];
    vf a, b;
    int pair = 0;
    for (; pair < num / 2; pair++)
        for (int c = 0; c < C; c++) {
            load_pair(values, pair, padded_dim, at + c * W, a, b);
            for (int i = 0; i < Q; i++) acc[i][c] += p[i * PAGE + 2 * pair] * a;
            for (int i = 0; i < Q; i++) acc[i][c] += p[i * PAGE + 2 * pair + 1] * b;
        }
    if (num % 2)  // the row after the last may hold anything, and 0 times that is not always 0
        for (int c = 0; c < C; c++) {
            load_pair(values, pair, padded_dim, at + c * W, a, b);
            for (int i = 0; i < Q; i++) acc[i][c] += p[i * PAGE + 2 * pair] * a;
        }
    for (int i = 0; i < Q; i++)
        for (int c = 0; c < C; c++) store(out + i * padded_dim + c * W, acc[i][c]);
}

template <int Q, class S>
void blend_rows(const float* p, const float* keep, const S* values, int num, int padded_dim, float* out) {
    int d = 0;
    for (; d + 4 * W <= padded_dim; d += 4 * W) blend<Q, 4>(p, keep, values, d, num, padded_dim, out + d);
    for (; d < padded_dim; d += W) blend<Q, 1>(p, keep, values, d, num, padded_dim, out + d);
}

// What a query needs from page to page: its largest score so far, and the sum of e^(score - peak), in lanes.
struct Soft {
    float peak;
    vf total[PARTS];
};

// Turns scores p [PAGE] into e^(score - peak), 0 outside of [begin, end). The peak may rise: returns the factor for
// what was summed up before.
inline float soften(float* p, int num_tiles, int begin, int end, Soft& soft) {
    for (int j = 0; j < begin; j++) p[j] = -__builtin_inff();
    for (int j = end; j < num_tiles * SIDE; j++) p[j] = -__builtin_inff();
    vf most = all(soft.peak);
    for (int j = 0; j < num_tiles * SIDE; j += W) most = larger(load(p + j), most);
    const float now = largest(most);
    const float keep = now == soft.peak ? 1.0f : exponential_of(soft.peak - now);
    for (int j = 0; j < num_tiles * SIDE; j += W) store(p + j, exponential(load(p + j) - now));
    for (int j = 0; j < begin; j++) p[j] = 0;
    for (int j = end; j < num_tiles * SIDE; j++) p[j] = 0;
    for (int i = 0; i < PARTS; i++) soft.total[i] *= keep;
    for (int t = 0; t < num_tiles; t++)
        for (int i = 0; i < PARTS; i++) soft.total[i] += load(p + t * SIDE + i * W);
    soft.peak = now;
    return keep;
}

// One page for Q queries, `from` and those after it. p [Q][PAGE] is scratch.
template <int Q, class S>
void page(const Attend& a, int index, int from, float* p, Soft* soft) {
    float keep[Q];
    int base = index * PAGE, end = 0;
    for (int i = 0; i < Q; i++) end = end > a.end[from + i] ? end : a.end[from + i];
    int num = least(PAGE, end - base);
    if (num <= 0) return;
    int num_tiles = (num + SIDE - 1) / SIDE;
    if (index + 1 < a.last)
        for (int at = 0; at < AHEAD; at += 64) __builtin_prefetch(a.pages[index + 1] + a.keys + at);
    score_tiles<Q>(a.q + static_cast<size_t>(from) * a.head_dim, a.head_dim,
                   reinterpret_cast<const S*>(a.pages[index] + a.keys), num_tiles, p);
    for (int i = 0; i < Q; i++) {
        int lo = a.begin[from + i] - base, hi = least(num, a.end[from + i] - base);
        lo = lo > 0 ? lo : 0;
        if (lo < hi) {
            keep[i] = soften(p + i * PAGE, num_tiles, lo, hi, soft[from + i]);
        } else {
            keep[i] = 1;
            memset(p + i * PAGE, 0, sizeof(float) * PAGE);
        }
    }
    float* out = a.out + static_cast<size_t>(from) * a.padded_dim;
    blend_rows<Q>(p, keep, reinterpret_cast<const S*>(a.pages[index] + a.values), num, a.padded_dim, out);
}

// softmax(q k) v for each query over the positions that it sees, page by page, with a running maximum (arXiv
// 1805.02867).
template <class S>
void attend(const Attend& a) {
    float p[TOGETHER * PAGE];
    Soft soft[QUERIES];
    memset(a.out, 0, sizeof(float) * a.num_queries * a.padded_dim);
    for (int i = 0; i < a.num_queries; i++) soft[i] = {-__builtin_inff(), {}};
    for (int index = a.first; index < a.last; index++) {
        int i = 0;
        for (; i + TOGETHER <= a.num_queries; i += TOGETHER) page<TOGETHER, S>(a, index, i, p, soft);
        if (W == 16 && i + 3 <= a.num_queries) page<3, S>(a, index, i, p, soft), i += 3;
        if (i + 2 <= a.num_queries) page<2, S>(a, index, i, p, soft), i += 2;
        if (i < a.num_queries) page<1, S>(a, index, i, p, soft);
    }
    for (int i = 0; i < a.num_queries; i++) {
        float* row = a.out + static_cast<size_t>(i) * a.padded_dim;
        float total = 0;
        for (int part = 0; part < PARTS; part++) total += sum(soft[i].total[part]);
        for (int d = 0; d < a.padded_dim; d += W) store(row + d, load(row + d) / total);
    }
}

void attend_float(const Attend& a) { attend<float>(a); }
void attend_bf16(const Attend& a) { attend<uint16_t>(a); }

int argmax(const float* x, int n) {
    vf most = all(-__builtin_inff());
    int i = 0;
    for (; i + W <= n; i += W) most = larger(load(x + i), most);
    float peak = largest(most);
    for (; i < n; i++) peak = x[i] > peak ? x[i] : peak;
    for (i = 0; i < n; i++)
        if (x[i] == peak) return i;
    return 0;
}

double exp_sum(const float* x, float peak, float scale, int n, float* y, float* sums) {
    double total = 0;
    for (int start = 0; start < n; start += STRETCH) {
        const int end = least(start + STRETCH, n);
        vf lanes = {};
        for (int i = start; i < end; i += W) {
            vf e = exponential((load_some(x + i, n - i) - peak) * scale);
            store_some(y + i, e, n - i);
            lanes += load_some(y + i, n - i);
        }
        *sums = sum(lanes);
        total += *sums++;
    }
    return total;
}

}  // namespace

const Vectors& WF_VECTORS() {
    static const Vectors table = {WF_NAME,     norm,         layer_norm,  add,      add_times, silu_times,
                                  relu2_times, gelu_times,   round8,      hadamard, rotate,    store_key,
                                  store_value, attend_float, attend_bf16, argmax,   exp_sum};
    return table;
}

}  // namespace wf
