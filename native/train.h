// The C interface of the loops that training spends its time in: codes of a weight, the weight of codes, and how the
// weight's gradient adds up to those of its scales. Torch does the same in tens of passes over each matrix.
//
// Every result has the same bits for any number of threads and on every instruction set. Pointers are borrowed during a
// call. Functions return 0, or another number on an error; wf_error() then says why.
#pragma once
#include "wf.h"

#ifdef __cplusplus
extern "C" {
#endif

// A complex layer of n rows and m columns, as in wf_matrix_complex: the real matrix is [2n, 2m].
//
//     stages         T, 1 to 4
//     num_rows       R, 1 or n: rows with scales of their own
//     num_groups     G, which divides m: groups of columns with scales of their own
//     scales         [2 (U, W), T, 2 (re, im), R, G]
//     rows, columns  [n], [m]: factors of rows and columns; both NULL if there are none
//     index          [2 (U, W), T, n, m], a byte each; code k stands for i^k
struct wf_complex {
    int n, m, stages, num_rows, num_groups;
    const float* scales;
    const float* rows;
    const float* columns;
};

// The codes nearest to weight [2n, 2m], among all 4^T sums.
WF_API int wf_complex_codes(wf_pool*, const struct wf_complex*, const float* weight, uint8_t* index);
// The weight [2n, 2m] that codes stand for.
WF_API int wf_complex_weight(wf_pool*, const struct wf_complex*, const uint8_t* index, float* weight);
// From the gradient [2n, 2m] of the weight, the gradients of scales, rows and columns, each in the shape of its own.
WF_API int wf_complex_gradient(wf_pool*, const struct wf_complex*, const uint8_t* index, const float* gradient,
                               float* to_scales, float* to_rows, float* to_columns);

// A table layer [n, k] with a scale for each weight: table[index] * scales. The table is ascending, of 4, 8 or 16 entries.
struct wf_table {
    int n, k, size;
    const float* scales;  // [n, k]
    const float* table;   // [size]
};

// The codes [n, k] nearest to weight / scales. Scales below 1e-8 count as 1e-8, with their sign.
WF_API int wf_table_codes(wf_pool*, const struct wf_table*, const float* weight, uint8_t* index);
// The weight [n, k] that codes stand for.
WF_API int wf_table_weight(wf_pool*, const struct wf_table*, const uint8_t* index, float* weight);
// From the gradient g [n, k] of the weight: m g for the latent weight and g (q - r m) for the scales, with r the weight
// over its scale, q the table's nearest entry and m whether r lies within the table; and for each entry of the table the
// sum of g times scale over its codes.
WF_API int wf_table_gradient(wf_pool*, const struct wf_table*, const float* weight, const float* gradient,
                             float* to_weight, float* to_scales, float* to_table);

// Rounds each row of x [n, k], fp32 or bf16, to 8 bits with a scale of its own and back.
WF_API int wf_rounded(wf_pool*, int n, int k, int bf16, const void* x, void* y);

#ifdef __cplusplus
}
#endif
