// wf_matmul: activations rounded once for all matrices that can share them, then every panel of every matrix.
#include <algorithm>
#include <memory>
#include <vector>

#include "exact.h"
#include "kernels.h"
#include "pool.h"
#include "wf.h"

namespace wf {
namespace {

constexpr int BLOCK = 24 * TILE;        // tokens at a time: their activations stay in the second-level cache
constexpr size_t RUN_BYTES = 8 << 10;   // of weights, the least that is worth handing to a thread
constexpr int RUNS_PER_THREAD = 12;
constexpr size_t MAX_BATCH = 1 << 20;

struct Call {
    wf_pool& pool;
    const Kernels& kernels;
    const wf_matrix* const* matrices;
    int count, k;
    const float* x;  // [batch, k]
    int batch;
    float* const* y;
    size_t offset;  // tokens ahead of x in y
};

// ---- Rounding

// Where the rounded token goes: what one `Columns` and one `col` need.
void spread_plain(const int8_t* q, Activations& to, int tile, int token) {
    const Columns& c = to.columns;
    const int tokens = to.tokens(tile), segments = c.stride / CELL;
    int8_t* data = const_cast<int8_t*>(to.tile(tile)) + token * CELL;
    for (int group = 0; group < c.groups; ++group, q += c.width)
        for (int segment = 0; segment < segments; ++segment, data += tokens * CELL) {
            const int left = c.width - segment * CELL, count = left < 0 ? 0 : left < CELL ? left : CELL;
            std::memcpy(data, q + (count ? segment * CELL : 0), count);
            std::memset(data + count, 0, CELL - count);
        }
}

void spread_complex(const int8_t* q, int half, Activations& to, int tile, int token) {
    const Columns& c = to.columns;
    const int tokens = to.tokens(tile), segments = c.stride / CELL;
    int8_t* data = const_cast<int8_t*>(to.tile(tile)) + token * CELL;
    for (int group = 0; group < c.groups; ++group, q += c.width)
        for (int segment = 0; segment < segments; ++segment, data += tokens * CELL) {
            const int left = c.width - segment / 2 * CELL, count = left < 0 ? 0 : left < CELL ? left : CELL;
            const int8_t* from = q + (segment % 2 ? half : 0);
            std::memcpy(data, from + (count ? segment / 2 * CELL : 0), count);
            std::memset(data + count, 0, CELL - count);
        }
}

void sum_groups(const int8_t* q, int half, Activations& to, int token, const Kernels& kernels) {
    const Columns& c = to.columns;
    for (int group = 0; group < c.groups; ++group) {
        const int8_t* from = q + size_t(group) * c.width;
        int32_t* lanes = to.sums.data() + (size_t(token) * c.groups + group) * 4;
        kernels.sum(from, c.width, lanes);
        if (c.complex) kernels.sum(from + half, c.width, lanes);
    }
}

void spread(const int8_t* q, int k, Activations& to, int token, const Kernels& kernels) {
    if (to.columns.complex) {
        spread_complex(q, k / 2, to, token / TILE, token % TILE);
    } else {
        spread_plain(q, to, token / TILE, token % TILE);
    }
    sum_groups(q, k / 2, to, token, kernels);
}

bool same_col(const wf_matrix& a, const wf_matrix& b) {
    return a.col.size() == b.col.size() && !std::memcmp(a.col.data(), b.col.data(), a.col.bytes());
}

// What the matrices of a call need: one rounding for each `col`, one order of activations for each `Columns` in it.
struct Rounding {
    const wf_matrix* first;  // whose col it is
    std::vector<Activations*> orders;
    Buffer<float> scales;  // [batch]
};

struct Needs {
    std::vector<Rounding> roundings;
    std::vector<std::unique_ptr<Activations>> owned;
    std::vector<std::vector<const Activations*>> streams;  // [matrix][stream]
    std::vector<const Rounding*> of;                       // [matrix]
};

Rounding& rounding_for(Needs& needs, const wf_matrix& m, int batch) {
    for (Rounding& r : needs.roundings)
        if (same_col(*r.first, m)) return r;
    needs.roundings.push_back({&m, {}, Buffer<float>(batch)});
    return needs.roundings.back();
}

Activations* order_for(Needs& needs, Rounding& rounding, const Columns& columns, int batch) {
    for (Activations* order : rounding.orders)
        if (order->columns == columns) return order;
    auto made = std::make_unique<Activations>();
    made->columns = columns;
    made->batch = batch;
    made->data.reset(made->length() * batch);
    made->sums.reset(size_t(columns.groups) * batch * 4);
    rounding.orders.push_back(made.get());
    needs.owned.push_back(std::move(made));
    return rounding.orders.back();
}

Needs needs_of(const Call& call) {
    Needs needs;
    needs.roundings.reserve(call.count);  // `of` points into it
    for (int i = 0; i < call.count; ++i) {
        const wf_matrix& m = *call.matrices[i];
        needs.streams.emplace_back();
        needs.of.push_back(nullptr);
        if (m.kind == Kind::DENSE) continue;
        Rounding& rounding = rounding_for(needs, m, call.batch);
        needs.of.back() = &rounding;
        for (const Stream& s : m.streams)
            needs.streams.back().push_back(order_for(needs, rounding, s.columns, call.batch));
    }
    return needs;
}

void round_token(const Call& call, Rounding& rounding, int token, uint8_t* scratch) {
    const float* x = call.x + size_t(token) * call.k;
    const Buffer<float>& col = rounding.first->col;
    auto* scaled = reinterpret_cast<float*>(scratch);
    auto* q = reinterpret_cast<int8_t*>(scaled + call.k);
    if (col.size()) {
        for (int j = 0; j < call.k; ++j) scaled[j] = x[j] * col[j];
        x = scaled;
    }
    rounding.scales[token] = call.kernels.quantize(x, call.k, q);
    for (Activations* order : rounding.orders) spread(q, call.k, *order, token, call.kernels);
}

void round_all(const Call& call, Needs& needs) {
    for (Rounding& rounding : needs.roundings)
        call.pool.each(call.batch, 4, [&](int thread, int begin, int end) {
            for (int token = begin; token < end; ++token)
                round_token(call, rounding, token, call.pool.scratch[thread].data());
        });
}

// ---- Panels

int first_row(const wf_matrix& m, int panel, int part) { return part * m.rows() + panel * PANEL; }

// y = sums * token's scale * row + bias for one panel.
void finish(const wf_matrix& m, int panel, const float* sums, const float* token_scales, int batch, float* y) {
    const int rows = std::min(PANEL, m.rows() - panel * PANEL), parts = m.parts();
    for (int token = 0; token < batch; ++token)
        for (int part = 0; part < parts; ++part) {
            const float* from = sums + (size_t(token) * parts + part) * PANEL;
            const size_t padded = (size_t(part) * m.panels() + panel) * PANEL;
            float* to = y + size_t(token) * m.n + first_row(m, panel, part);
            for (int row = 0; row < rows; ++row) {
                float value = from[row] * token_scales[token];
                if (m.row.size()) value *= m.row[padded + row];
                to[row] = m.bias.size() ? value + m.bias[padded + row] : value;
            }
        }
}

void rounded_panel(const Call& call, const Needs& needs, int index, int panel, uint8_t* scratch) {
    const wf_matrix& m = *call.matrices[index];
    auto* sums = reinterpret_cast<float*>(scratch);
    std::fill_n(sums, size_t(call.batch) * m.parts() * PANEL, 0.0f);
    for (size_t i = 0; i < m.streams.size(); ++i)
        call.kernels.product(m.streams[i], panel, *needs.streams[index][i], sums);
    finish(m, panel, sums, needs.of[index]->scales.data(), call.batch, call.y[index] + call.offset * m.n);
}

float dot_row(const Call& call, const wf_matrix& m, int n, const float* decoded, const float* x) {
    if (m.weight16.size()) return call.kernels.dot_bf16(m.weight16.data() + size_t(n) * m.k, x, m.k);
    return call.kernels.dot(m.weight32.size() ? m.weight32.data() + size_t(n) * m.k : decoded, x, m.k);
}

// `x` [batch, k] has been through `col`.
void exact_panel(const Call& call, const wf_matrix& m, int panel, const float* x, float* y, float* scratch) {
    const int rows = std::min(PANEL, m.rows() - panel * PANEL);
    for (int part = 0; part < m.parts(); ++part)
        for (int row = 0; row < rows; ++row) {
            const int n = first_row(m, panel, part) + row;
            const size_t padded = (size_t(part) * m.panels() + panel) * PANEL + row;
            if (m.kind != Kind::DENSE) decode_row(m, n, scratch);
            for (int token = 0; token < call.batch; ++token) {
                float value = dot_row(call, m, n, scratch, x + size_t(token) * m.k);
                if (m.row.size()) value *= m.row[padded];
                y[size_t(token) * m.n + n] = m.bias.size() ? value + m.bias[padded] : value;
            }
        }
}

// ---- A call

// Tasks to take at a time: enough work to be worth it, few enough to even out.
int run_length(const Call& call, int tasks) {
    size_t bytes = 0;
    for (int i = 0; i < call.count; ++i) bytes += wf_matrix_bytes(call.matrices[i]);
    const size_t least = RUN_BYTES / (bytes / tasks * call.batch + 1) + 1;
    const size_t even = tasks / (size_t(call.pool.threads()) * RUNS_PER_THREAD) + 1;
    return static_cast<int>(std::max(least, even));
}

// body(matrix, panel, thread) for all panels of all matrices.
template <class Body>
void each_panel(const Call& call, Body body) {
    int tasks = 0;
    for (int i = 0; i < call.count; ++i) tasks += call.matrices[i]->panels();
    call.pool.each(tasks, run_length(call, tasks), [&](int thread, int begin, int end) {
        int index = 0, panel = begin;
        while (panel >= call.matrices[index]->panels()) panel -= call.matrices[index++]->panels();
        for (int task = begin; task < end; ++task, ++panel) {
            if (panel == call.matrices[index]->panels()) ++index, panel = 0;
            body(index, panel, thread);
        }
    });
}

// One panel's sums, or one token on its way to int8.
size_t scratch_bytes(const Call& call) {
    const size_t sums = size_t(call.batch) * MAX_PARTS * PANEL * sizeof(float);
    return std::max(sums, size_t(call.k) * (sizeof(float) + 1));
}

void run_rounded(const Call& call) {
    Needs needs = needs_of(call);
    round_all(call, needs);
    each_panel(call, [&](int index, int panel, int thread) {
        const wf_matrix& m = *call.matrices[index];
        uint8_t* scratch = call.pool.scratch[thread].data();
        if (m.kind == Kind::DENSE) {
            exact_panel(call, m, panel, call.x, call.y[index] + call.offset * m.n, nullptr);
        } else {
            rounded_panel(call, needs, index, panel, scratch);
        }
    });
}

// x * col for every matrix that has one: [matrix][batch, k].
void run_exact(const Call& call) {
    std::vector<Buffer<float>> scaled(call.count);
    for (int i = 0; i < call.count; ++i) {
        const wf_matrix& m = *call.matrices[i];
        if (!m.col.size()) continue;
        scaled[i].reset(size_t(call.batch) * call.k);
        for (size_t j = 0; j < scaled[i].size(); ++j) scaled[i][j] = call.x[j] * m.col[j % call.k];
    }
    each_panel(call, [&](int index, int panel, int thread) {
        const wf_matrix& m = *call.matrices[index];
        const float* x = scaled[index].size() ? scaled[index].data() : call.x;
        exact_panel(call, m, panel, x, call.y[index] + call.offset * m.n,
                    reinterpret_cast<float*>(call.pool.scratch[thread].data()));
    });
}

void run(wf_pool& pool, const wf_matrix* const* matrices, int count, const float* x, int batch, float* const* y,
         wf_mode mode) {
    std::lock_guard<std::mutex> turn(pool.turn);
    const int k = matrices[0]->k;
    for (int first = 0; first < batch; first += BLOCK) {
        const Call call{pool, kernels(), matrices, count, k, x + size_t(first) * k, std::min(BLOCK, batch - first), y,
                        size_t(first)};
        for (auto& scratch : pool.scratch) scratch.grow(scratch_bytes(call));
        mode == WF_EXACT ? run_exact(call) : run_rounded(call);
    }
}

}  // namespace
}  // namespace wf

extern "C" int wf_matmul(wf_pool* pool, const wf_matrix* const* matrices, int count, const float* x, int batch,
                         float* const* y, enum wf_mode mode) {
    return wf::guarded(1, [&] {
        wf::check(pool && matrices && x && y, "pool, matrices, x, y: must be given");
        wf::check(count >= 1, "count: must be at least 1");
        wf::check(batch >= 0 && size_t(batch) <= wf::MAX_BATCH, "batch: must be 0 to 1048576");
        wf::check(mode == WF_INT8 || mode == WF_EXACT, "mode: unknown");
        for (int i = 0; i < count; ++i) {
            wf::check(matrices[i] && y[i], "matrices, y: an entry is missing");
            wf::check(matrices[i]->k == matrices[0]->k, "matrices: their widths differ");
        }
        wf::run(*pool, matrices, count, x, batch, y, mode);
        return 0;
    });
}
