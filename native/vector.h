// Loops over floats that every instruction set compiles for itself (vector_*.cpp from vector_impl.h); `vectors()` gives
// the table of the best one that this processor runs. Each result is a fixed function of its row alone.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace wf {

constexpr int PAGE = 64;       // positions in a page of the cache
constexpr int SIDE = 16;       // positions that lie side by side in it
constexpr int STRETCH = 1024;  // numbers whose sum `exp_sum` gives by itself
constexpr int QUERIES = 32;    // queries in one call of `attend`

// Keys and values of up to `PAGE` positions of one layer and head: keys [PAGE / 16][head_dim][16],
// values [PAGE][padded_dim]. Elements are float, or bf16 of which two rows (of head_dim, of PAGE) share words.
struct Attend {
    int head_dim, padded_dim;  // the latter a multiple of 16
    int num_queries;           // rows of q and out, at most QUERIES
    int first, last;           // pages from `first` up to, not including, `last` are looked at
    const char* const* pages;  // [last], with keys and values at these bytes from their beginnings:
    size_t keys, values;
    const int* begin;  // [num_queries] first position that a query sees
    const int* end;    // [num_queries] and the one after the last
    const float* q;    // [num_queries][head_dim], scaled
    float* out;        // [num_queries][padded_dim]
};

struct Vectors {
    const char* name;
    void (*norm)(const float* x, const float* gain, float eps, int n, float* y);  // y may be x
    void (*add)(const float* x, int n, float* y);                                 // y += x
    void (*silu_times)(const float* gate, const float* up, int n, float* y);      // silu(gate) * up
    void (*relu2_times)(const float* gate, const float* up, int n, float* y);     // relu(gate)^2 * up
    void (*round8)(const float* x, int n, float* y);                              // to 8 bits and back, as in training
    void (*rotate)(const float* cosine, const float* sine, int half, float* x);   // x [2 half]: pairs (j, j + half)
    void (*store_key)(const float* x, int head_dim, int bf16, int place, void* tiles);
    void (*store_value)(const float* x, int head_dim, int padded_dim, int bf16, int place, void* rows);
    void (*attend_float)(const Attend&);
    void (*attend_bf16)(const Attend&);
    int (*argmax)(const float* x, int n);  // the lowest index of the largest; 0 where all are NaN
    // y = exp((x - peak) * scale), and their sum; sums [n / STRETCH, rounded up] get those of each stretch.
    double (*exp_sum)(const float* x, float peak, float scale, int n, float* y, float* sums);
};

const Vectors& vectors();  // throws Error where WF_ISA names one that is not there
const Vectors& vectors_generic();
#if defined(__x86_64__) || defined(_M_X64)
const Vectors& vectors_avx2();
const Vectors& vectors_avx512();
#endif

}  // namespace wf
