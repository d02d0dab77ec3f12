// Loops over rows, for training. Each rows_*.cpp compiles rows_impl.h for one instruction set, and `row_loops()` gives
// the table of functions that fits the kernels in use. All of them give the same bits: sums have 8 lanes everywhere, and
// nothing is contracted.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "train.h"

namespace wf {

constexpr int MOST_STAGES = 4;
constexpr int BLOCK = 16;  // rows whose sums are one part of a sum over all rows

// What one block of rows adds to the gradients. Entries are those of one row if rows have scales of their own.
struct ComplexSums {
    float* scales;   // [2, T, 2, G], or those of all rows: [2, T, 2, n, G]
    float* rows;     // [n], or NULL
    float* columns;  // [m], or NULL
};

struct RowLoops {
    // Rows from `begin` up to, but not including, `end`.
    void (*complex_codes)(const wf_complex&, const float* weight, int begin, int end, uint8_t* index);
    void (*complex_weight)(const wf_complex&, const uint8_t* index, int begin, int end, float* weight);
    void (*complex_gradient)(const wf_complex&, const uint8_t* index, const float* gradient, int begin, int end,
                             const ComplexSums&);
    // `count` entries that lie side by side, from the entry `begin`.
    void (*table_codes)(const wf_table&, const float* weight, size_t begin, size_t count, uint8_t* index);
    void (*table_weight)(const wf_table&, const uint8_t* index, size_t begin, size_t count, float* weight);
    void (*table_gradient)(const wf_table&, const float* weight, const float* gradient, size_t begin, size_t count,
                           float* to_weight, float* to_scales, float* to_table);
    void (*rounded_float)(const void* x, int k, void* y);
    void (*rounded_bf16)(const void* x, int k, void* y);
};

const RowLoops& row_loops();  // throws Error if WF_ISA names what this processor does not have
const RowLoops& row_loops_generic();
#if defined(__x86_64__) || defined(_M_X64)
const RowLoops& row_loops_avx2();
#endif

}  // namespace wf
