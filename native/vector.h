// Loops over floats, for the decoder. Each vector_*.cpp compiles vector_impl.h for one instruction set, and `vectors()`
// gives the table of functions that fits the kernels in use. On one instruction set, a result depends on its own row
// alone.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace wf {

constexpr int PAGE = 64;       // positions in a page of the cache
constexpr int SIDE = 16;       // positions that lie side by side in a page
constexpr int STRETCH = 1024;  // `exp_sum` gives a sum for each stretch of so many numbers
constexpr int QUERIES = 32;    // the most queries in one call of `attend`

// Attention of several queries to the cache of one layer and head. A page has keys [PAGE / 16][head_dim][16] and values
// [PAGE][padded_dim], in fp32 or bf16. In bf16 two neighbouring rows share words of 32 bits: of keys, rows of head_dim;
// of values, rows of PAGE.
struct Attend {
    int head_dim, padded_dim;  // padded_dim is a multiple of 16
    int num_queries;           // rows of q and out, at most QUERIES
    int first, last;           // pages from `first` up to, but not including, `last` are read
    const char* const* pages;  // [last]; keys and values begin at these bytes of each:
    size_t keys, values;
    const int* begin;  // [num_queries]: the first position that a query sees
    const int* end;    // [num_queries]: the position after the last that it sees
    const float* q;    // [num_queries][head_dim], already scaled
    float* out;        // [num_queries][padded_dim]
};

struct Vectors {
    const char* name;
    void (*norm)(const float* x, const float* gain, float eps, int n, float* y);  // y may be x
    // y = (x - mean) / deviation * gain + shift; shift may be NULL, y may be x.
    void (*layer_norm)(const float* x, const float* gain, const float* shift, float eps, int n, float* y);
    void (*add)(const float* x, int n, float* y);                      // y += x
    void (*add_times)(const float* x, float factor, int n, float* y);  // y += x * factor
    // act(gate) * up, or act(gate) if `up` is NULL; y may be gate.
    void (*silu_times)(const float* gate, const float* up, int n, float* y);
    void (*relu2_times)(const float* gate, const float* up, int n, float* y);  // relu(gate)^2
    void (*gelu_times)(const float* gate, const float* up, int n, float* y);   // GELU with the tanh in it
    void (*round8)(const float* x, int n, float* y);                           // to 8 bits and back, as in training
    // y = H (signs * x) with the Hadamard matrix of +1 and -1 for each `block` numbers, a power of 2; y may be x.
    void (*hadamard)(const float* x, const float* signs, int n, int block, float* y);
    void (*rotate)(const float* cosine, const float* sine, int half, float* x);  // x [2 half]: pairs (j, j + half)
    void (*store_key)(const float* x, int head_dim, int bf16, int place, void* tiles);
    void (*store_value)(const float* x, int head_dim, int padded_dim, int bf16, int place, void* rows);
    void (*attend_float)(const Attend&);
    void (*attend_bf16)(const Attend&);
    int (*argmax)(const float* x, int n);  // the lowest index of the largest, or 0 if all are NaN
    // y = exp((x - peak) * scale). Returns the sum of y; sums [n / STRETCH, rounded up] get the sum of each stretch.
    double (*exp_sum)(const float* x, float peak, float scale, int n, float* y, float* sums);
};

const Vectors& vectors();  // throws Error if WF_ISA names what this processor does not have
const Vectors& vectors_generic();
#if defined(__x86_64__) || defined(_M_X64)
const Vectors& vectors_avx2();
const Vectors& vectors_avx512();
#endif

}  // namespace wf
