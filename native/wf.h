// The C interface of the packed runtime: linear layers of 1 to 8 bits a weight, and a decoder made of them.
//
// A layer is      y[n] = row[n] * sum_k V[n, k] * col[k] * x[k]  (+ bias[n])
//
// where V is given by codes; tables may have several pairs of row and col, whose results add up (low-rank scales).
// Activations col * x are rounded to int8 per token (WF_INT8: q = rint(. * (1 / max|.| * 127)),
// the products are then exact in integers), or kept (WF_EXACT: fp32 arithmetic on the values of the codes). A token with
// NaN or infinity gives NaN. In WF_INT8, values that are not on a grid of integers are taken to 15 bits of the largest
// (tables) or 13 (scales of Fairy2i). The result is the same bits whatever the number of threads, the instruction set, and
// whatever else is in the batch.
//
// Pointers are borrowed during a call and copied where needed. Constructors return NULL, other functions a code other than 0,
// and wf_error() then says why, in one line; the text is the calling thread's own. Sizes are checked before memory is taken.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define WF_API __declspec(dllexport)
#else
#define WF_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define WF_ABI 3

enum wf_mode { WF_INT8 = 0, WF_EXACT = 1 };

typedef struct wf_pool wf_pool;      // worker threads; calls on one pool take turns
typedef struct wf_matrix wf_matrix;  // an immutable packed layer

WF_API int wf_abi(void);
WF_API const char* wf_isa(void);  // what was chosen: "avx512-vnni", "avx-vnni", "avx2", "neon-dotprod", "generic"
WF_API const char* wf_error(void);

WF_API wf_pool* wf_pool_new(int threads);  // the caller is one of them
WF_API void wf_pool_free(wf_pool*);

// Values table[codes[n, k]], times scales[r, g] of the row's and column's group. codes [n, k], one byte each, < 2**bits;
// n to 2**24, k to 2**16; bits 1 to 4; table [2**bits]; scales [num_rows, num_groups] with num_rows 1 or n and k a multiple of num_groups;
// row [rank, n] and col [rank, k], rank 1 to 8, may be NULL where rank is 1, and bias [n]. Ternary is bits 2 with the table
// -1, 0, 1, 0.
WF_API wf_matrix* wf_matrix_table(int n, int k, int bits, const uint8_t* codes, const float* table, const float* scales,
                                  int num_rows, int num_groups, int rank, const float* row, const float* col,
                                  const float* bias);

// Fairy2i (arXiv 2512.02901). codes [2 (U, W), T, n / 2, k / 2], entry j stands for i^j; scales [2, T, 2 (re, im), R, G]
// with R 1 or n / 2 and G dividing k / 2; n and k even (the caller pads). T 1 to 4.
WF_API wf_matrix* wf_matrix_complex(int n, int k, int num_stages, const uint8_t* codes, const float* scales,
                                    int num_rows, int num_groups, const float* row, const float* col,
                                    const float* bias);

// weight [n, k] int8 times row[n].
WF_API wf_matrix* wf_matrix_int8(int n, int k, const int8_t* weight, const float* row, const float* bias);

// weight [n, k] fp32, kept as bf16 (`exact` 0) or fp32 (1): layers that are not quantized.
WF_API wf_matrix* wf_matrix_dense(int n, int k, const float* weight, const float* bias, int exact);

WF_API void wf_matrix_free(wf_matrix*);
WF_API int wf_matrix_rows(const wf_matrix*);      // n
WF_API int wf_matrix_columns(const wf_matrix*);   // k
WF_API size_t wf_matrix_bytes(const wf_matrix*);  // of memory it holds
WF_API const char* wf_matrix_kernel(
    const wf_matrix*);  // which kernel serves it, for people: "ternary", "complex-grid", ...
WF_API int wf_matrix_row(const wf_matrix*, int n, float* out);  // row n of the dense weight [k], in fp32 (embeddings)

// y[i] = matrix i applied to x [batch, k], for `count` (1 to 8) matrices of one width k: y[i] is [batch, n_i], contiguous.
// Activations are rounded once for all matrices of the same col; one parallel region.
WF_API int wf_matmul(wf_pool*, const wf_matrix* const* matrices, int count, const float* x, int batch, float* const* y,
                     enum wf_mode mode);

// y = x / sqrt(mean of x^2 + eps) * gain for each row of x [batch, k].
WF_API int wf_norm(const float* x, const float* gain, float eps, int batch, int k, float* y);

#ifdef __cplusplus
}
#endif
