// The functions of train.h: checks, threads, and sums over blocks of rows in an order that no thread changes.
#include "rows.h"

#include <algorithm>
#include <cstring>

#include "common.h"
#include "kernels.h"
#include "pool.h"

namespace wf {

const RowLoops& row_loops() {
#if defined(__x86_64__) || defined(_M_X64)
    static const bool avx = std::strncmp(kernels().name, "avx", 3) == 0;
    if (avx) return row_loops_avx2();
#endif
    return row_loops_generic();
}

namespace {

void check_complex(const wf_pool* pool, const wf_complex* c) {
    check(pool && c && c->scales, "pool, complex, scales: must be given");
    check(c->n >= 1 && c->m >= 1, "n, m: must be at least 1");
    check(c->stages >= 1 && c->stages <= MOST_STAGES, "stages: must be 1 to 4");
    check(c->num_rows == 1 || c->num_rows == c->n, "num_rows: must be 1 or n");
    check(c->num_groups >= 1 && c->m % c->num_groups == 0, "num_groups: must divide m");
    check(!c->rows == !c->columns, "rows, columns: one of them is missing");
}

void check_table(const wf_pool* pool, const wf_table* t) {
    check(pool && t && t->scales && t->table, "pool, table, scales: must be given");
    check(t->n >= 1 && t->k >= 1, "n, k: must be at least 1");
    check(t->size == 4 || t->size == 8 || t->size == 16, "size: must be 4, 8 or 16");
}

// Calls body(block, begin, end) for every block of rows.
template <class Body>
void each_block(wf_pool& pool, int rows, Body body) {
    std::lock_guard<std::mutex> turn(pool.turn);
    pool.each(ceil_div(rows, BLOCK), 1, [&](int, int first, int last) {
        for (int block = first; block < last; ++block) body(block, block * BLOCK, std::min(rows, (block + 1) * BLOCK));
    });
}

// to[i] = the sum of parts[block][i], block after block.
void add_up(const Buffer<float>& parts, int blocks, size_t size, float* to) {
    Buffer<double> sums(size);
    for (int block = 0; block < blocks; ++block)
        for (size_t i = 0; i < size; ++i) sums.data()[i] += parts.data()[block * size + i];
    for (size_t i = 0; i < size; ++i) to[i] = static_cast<float>(sums.data()[i]);
}

void complex_gradient(wf_pool& pool, const wf_complex& c, const uint8_t* index, const float* gradient, float* to_scales,
                      float* to_rows, float* to_columns) {
    const int blocks = ceil_div(c.n, BLOCK);
    const size_t width = static_cast<size_t>(c.m), size = static_cast<size_t>(4) * c.stages * c.num_rows * c.num_groups;
    const bool shared = c.num_rows == 1;  // all rows add to the same scales
    Buffer<float> scales(shared ? blocks * size : 0), columns(c.rows ? blocks * width : 0);
    if (!shared) std::fill(to_scales, to_scales + size, 0.0f);
    each_block(pool, c.n, [&](int block, int begin, int end) {
        row_loops().complex_gradient(c, index, gradient, begin, end,
                                     {shared ? scales.data() + block * size : to_scales, to_rows,
                                      c.rows ? columns.data() + block * width : nullptr});
    });
    if (shared) add_up(scales, blocks, size, to_scales);
    if (c.rows) add_up(columns, blocks, width, to_columns);
}

// Calls body(block, first entry, number of entries) for every block of rows.
template <class Body>
void each_stretch(wf_pool& pool, const wf_table& t, Body body) {
    const size_t width = static_cast<size_t>(t.k);
    each_block(pool, t.n, [&](int block, int begin, int end) { body(block, begin * width, (end - begin) * width); });
}

}  // namespace
}  // namespace wf

extern "C" {

int wf_complex_codes(wf_pool* pool, const wf_complex* c, const float* weight, uint8_t* index) {
    return wf::guarded(1, [&] {
        wf::check_complex(pool, c);
        wf::check(weight && index, "weight, index: must be given");
        wf::each_block(*pool, c->n,
                       [&](int, int begin, int end) { wf::row_loops().complex_codes(*c, weight, begin, end, index); });
        return 0;
    });
}

int wf_complex_weight(wf_pool* pool, const wf_complex* c, const uint8_t* index, float* weight) {
    return wf::guarded(1, [&] {
        wf::check_complex(pool, c);
        wf::check(weight && index, "weight, index: must be given");
        wf::each_block(*pool, c->n,
                       [&](int, int begin, int end) { wf::row_loops().complex_weight(*c, index, begin, end, weight); });
        return 0;
    });
}

int wf_complex_gradient(wf_pool* pool, const wf_complex* c, const uint8_t* index, const float* gradient,
                        float* to_scales, float* to_rows, float* to_columns) {
    return wf::guarded(1, [&] {
        wf::check_complex(pool, c);
        wf::check(index && gradient && to_scales, "index, gradient, to_scales: must be given");
        wf::check(!c->rows || (to_rows && to_columns), "to_rows, to_columns: must be given");
        wf::complex_gradient(*pool, *c, index, gradient, to_scales, to_rows, to_columns);
        return 0;
    });
}

int wf_table_codes(wf_pool* pool, const wf_table* t, const float* weight, uint8_t* index) {
    return wf::guarded(1, [&] {
        wf::check_table(pool, t);
        wf::check(weight && index, "weight, index: must be given");
        wf::each_stretch(*pool, *t, [&](int, size_t begin, size_t count) {
            wf::row_loops().table_codes(*t, weight, begin, count, index);
        });
        return 0;
    });
}

int wf_table_weight(wf_pool* pool, const wf_table* t, const uint8_t* index, float* weight) {
    return wf::guarded(1, [&] {
        wf::check_table(pool, t);
        wf::check(weight && index, "weight, index: must be given");
        wf::each_stretch(*pool, *t, [&](int, size_t begin, size_t count) {
            wf::row_loops().table_weight(*t, index, begin, count, weight);
        });
        return 0;
    });
}

int wf_table_gradient(wf_pool* pool, const wf_table* t, const float* weight, const float* gradient, float* to_weight,
                      float* to_scales, float* to_table) {
    return wf::guarded(1, [&] {
        wf::check_table(pool, t);
        wf::check(weight && gradient && to_weight && to_scales && to_table, "an argument is missing");
        const size_t size = static_cast<size_t>(t->size);
        const int blocks = wf::ceil_div(t->n, wf::BLOCK);
        wf::Buffer<float> parts(blocks * size);
        wf::each_stretch(*pool, *t, [&](int block, size_t begin, size_t count) {
            wf::row_loops().table_gradient(*t, weight, gradient, begin, count, to_weight, to_scales,
                                           parts.data() + block * size);
        });
        wf::add_up(parts, blocks, size, to_table);
        return 0;
    });
}

int wf_rounded(wf_pool* pool, int n, int k, int bf16, const void* x, void* y) {
    return wf::guarded(1, [&] {
        wf::check(pool && x && y && n >= 1 && k >= 1, "pool, x, y: must be given, and n, k at least 1");
        const auto round = bf16 ? wf::row_loops().rounded_bf16 : wf::row_loops().rounded_float;
        const size_t stride = static_cast<size_t>(k) * (bf16 ? 2 : 4);
        wf::each_block(*pool, n, [&](int, int begin, int end) {
            for (int row = begin; row < end; ++row)
                round(static_cast<const char*>(x) + row * stride, k, static_cast<char*>(y) + row * stride);
        });
        return 0;
    });
}

}  // extern "C"
