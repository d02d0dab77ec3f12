// The C interface of the packed runtime: linear layers of 1 to 8 bits a weight. decoder.h adds a decoder made of them.
//
// A layer is      y[n] = row[n] * sum_k V[n, k] * col[k] * x[k]  (+ bias[n])
//
// Codes say what V is. Tables may have several pairs of row and col, whose results add up (low-rank scales).
//
// WF_INT8 rounds the activations col * x of each token to int8: q = rint(v * (1 / max|v| * 127)). Products are then
// exact in integers. Values that lie on no grid of small integers are rounded, too: to 15 bits of the largest (tables),
// or to 13 bits (complex scales). WF_EXACT does not round; it multiplies in fp32 with the values of the codes. A token
// with NaN or infinity gives NaN.
//
// The result has the same bits whatever the number of threads, the instruction set, and whatever else is in the batch.
//
// Pointers are borrowed during a call; constructors copy what they need. Constructors return NULL on an error, other
// functions a code other than 0. wf_error() then says why, in one line, to the thread that made the call. Sizes are
// checked before memory is taken.
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

#define WF_ABI 8

enum wf_mode { WF_INT8 = 0, WF_EXACT = 1 };

typedef struct wf_pool wf_pool;      // worker threads; calls on one pool wait for each other
typedef struct wf_matrix wf_matrix;  // an immutable packed layer

WF_API int wf_abi(void);
// The instruction set in use: "avx512-vnni", "avx-vnni", "avx2", "neon-dotprod" or "generic".
WF_API const char* wf_isa(void);
WF_API const char* wf_error(void);

WF_API wf_pool* wf_pool_new(int threads);  // the caller is one of them
// Calls body(context) on at most `threads` threads, the caller among them, and returns when all have returned. GOMP_parallel
// of GNU OpenMP is such a function; its flags are 0.
typedef void (*wf_team)(void (*body)(void* context), void* context, unsigned threads, unsigned flags);
// A pool without threads of its own: it works on those of somebody else.
WF_API wf_pool* wf_pool_on_team(int threads, wf_team team);
WF_API void wf_pool_free(wf_pool*);

// V[n, k] = table[codes[n, k]] * scales[r, g], where r is the row or 0 and g the column's group.
//
//     n, k           1 to 2^24, 1 to 2^16
//     codes          [n, k], a byte each, below 2^bits; bits is 1 to 4
//     table          [2^bits]; ternary is bits 2 with the table -1, 0, 1, 0
//     scales         [num_rows, num_groups]; num_rows is 1 or n, num_groups divides k
//     row, col       [rank, n], [rank, k]; rank is 1 to 8. Each may be NULL if rank is 1
//     bias           [n] or NULL
WF_API wf_matrix* wf_matrix_table(int n, int k, int bits, const uint8_t* codes, const float* table, const float* scales,
                                  int num_rows, int num_groups, int rank, const float* row, const float* col,
                                  const float* bias);

// A complex layer of n / 2 rows and k / 2 columns, U z + W conj(z), in real numbers. The first half of x and y are real
// parts, the second half imaginary parts. U and W are sums over T stages of codes times scales; code j stands for i^j.
// (Fairy2i, arXiv 2512.02901, has such codes.)
//
//     n, k           even: the caller pads
//     num_stages     T, 1 to 4
//     codes          [2 (U, W), T, n / 2, k / 2]
//     scales         [2 (U, W), T, 2, num_rows, num_groups], those of real codes and those of imaginary codes;
//                    num_rows is 1 or n / 2, num_groups divides k / 2
WF_API wf_matrix* wf_matrix_complex(int n, int k, int num_stages, const uint8_t* codes, const float* scales,
                                    int num_rows, int num_groups, const float* row, const float* col,
                                    const float* bias);

// V is weight [n, k], int8.
WF_API wf_matrix* wf_matrix_int8(int n, int k, const int8_t* weight, const float* row, const float* bias);

// A layer that is not quantized: V is weight [n, k], kept as bf16 (`exact` 0) or as fp32 (1).
WF_API wf_matrix* wf_matrix_dense(int n, int k, const float* weight, const float* bias, int exact);

WF_API void wf_matrix_free(wf_matrix*);
WF_API int wf_matrix_rows(const wf_matrix*);      // n
WF_API int wf_matrix_columns(const wf_matrix*);   // k
WF_API size_t wf_matrix_bytes(const wf_matrix*);  // of memory that it holds
// The kernel that serves it, for people to read: "ternary", "complex-grid" and so on.
WF_API const char* wf_matrix_kernel(const wf_matrix*);
// Row n of the weight, factors included, in fp32: out [k]. Embeddings are read by it.
WF_API int wf_matrix_row(const wf_matrix*, int n, float* out);

// Applies `count` (1 to 8) matrices of one width k to x [batch, k]. The result of matrix i is y[i] [batch, n_i],
// contiguous. This costs less than a call for each: matrices with the same col share the rounding, and threads are
// started once.
WF_API int wf_matmul(wf_pool*, const wf_matrix* const* matrices, int count, const float* x, int batch, float* const* y,
                     enum wf_mode mode);

// y = x / sqrt(mean of x^2 + eps) * gain for each row of x [batch, k].
WF_API int wf_norm(const float* x, const float* gain, float eps, int batch, int k, float* y);

#ifdef __cplusplus
}
#endif
