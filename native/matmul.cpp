// wf_matmul. Activations are rounded, once for all matrices that can share them. Then threads take panels of all
// matrices.
#include <algorithm>
#include <utility>

#include "exact.h"
#include "kernels.h"
#include "pool.h"
#include "wf.h"

namespace wf {
namespace {

constexpr int MAX_TOKENS = 24 * TILE, MAX_TOKENS_OF_TABLES = 2 * TILE;
constexpr size_t RUN_BYTES = 8 << 10;  // of weights: a run that reads fewer is not worth handing to a thread
constexpr int RUNS_PER_THREAD = 16;    // at most, if no run were a long one (pool.h)
constexpr size_t MAX_BATCH = 1 << 20;
constexpr int MAX_COUNT = 8, MAX_STREAMS = 2, MAX_ORDERS = MAX_COUNT * MAX_STREAMS;

struct Call {
    wf_pool& pool;
    const Kernels& kernels;
    const wf_matrix* const* matrices;
    int count, k;
    const float* x;  // [batch, k]
    int batch;
    float* const* y;
    size_t offset;  // tokens of y that come before the first of x

    float* result(int index) const { return y[index] + offset * matrices[index]->n; }
};

// ---- Rounding

// Copies a segment of which `left` bytes or more are there, and fills it up with zeros.
void spread_segment(int8_t* to, const int8_t* from, int left) {
    if (left >= CELL) {
        std::memcpy(to, from, CELL);
    } else {
        std::memset(to, 0, CELL);
        if (left > 0) std::memcpy(to, from, left);
    }
}

// Writes a rounded token where `to.columns` wants it. In the complex case, imaginary inputs begin at `half`.
void spread_plain(const int8_t* q, const Activations& to, int tile, int token) {
    const Columns& c = to.columns;
    const int step = to.tokens(tile) * CELL;
    int8_t* data = to.at(tile) + token * CELL;
    for (int group = 0; group < c.groups; ++group, q += c.width)
        for (int at = 0; at < c.stride; at += CELL, data += step) spread_segment(data, q + at, c.width - at);
}

void spread_complex(const int8_t* q, int half, const Activations& to, int tile, int token) {
    const Columns& c = to.columns;
    const int step = to.tokens(tile) * CELL;
    int8_t* data = to.at(tile) + token * CELL;
    for (int group = 0; group < c.groups; ++group, q += c.width)
        for (int at = 0; at < c.stride / 2; at += CELL, data += 2 * step) {
            spread_segment(data, q + at, c.width - at);
            spread_segment(data + step, q + half + at, c.width - at);
        }
}

void sum_groups(const int8_t* q, int half, const Activations& to, int token, const Kernels& kernels) {
    const Columns& c = to.columns;
    for (int group = 0; group < c.groups; ++group) {
        const int8_t* from = q + static_cast<size_t>(group) * c.width;
        int32_t* lanes = to.sums + (static_cast<size_t>(token) * c.groups + group) * 4;
        std::fill_n(lanes, 4, 0);
        kernels.sum(from, c.width, lanes);
        if (c.complex) kernels.sum(from + half, c.width, lanes);
    }
}

void spread(const int8_t* q, int k, const Activations& to, int token, const Kernels& kernels) {
    if (to.columns.planes) return kernels.tables(q, to, token);
    if (to.columns.complex) {
        spread_complex(q, k / 2, to, token / to.tile, token % to.tile);
    } else {
        spread_plain(q, to, token / to.tile, token % to.tile);
    }
    sum_groups(q, k / 2, to, token, kernels);
}

bool same_col(const wf_matrix& a, const wf_matrix& b) {
    if (a.col.size() != b.col.size()) return false;
    return !a.col.size() || !std::memcmp(a.col.data(), b.col.data(), a.col.bytes());
}

// Activations times one `col`, rounded, in every order that a matrix with this col needs.
struct Rounding {
    const wf_matrix* first;  // the first matrix that has this col
    int batch;               // tokens times the matrix's rank
    float* scales;           // [batch]
    int num_orders = 0;
    Activations orders[MAX_ORDERS];
};

// All roundings of a call. They lie in the pool's memory, which is kept from call to call: a decoder makes hundreds of
// short calls for a token, and allocations would take a good part of their time.
class Needs {
  public:
    explicit Needs(const Call& call) : call_(call) {
        for (int i = 0; i < call.count; ++i) {
            if (call.matrices[i]->kind == Kind::DENSE) continue;
            Rounding& rounding = rounding_for(*call.matrices[i]);
            of_[i] = &rounding;
            for (size_t s = 0; s < call.matrices[i]->streams.size(); ++s)
                order_[i][s] = order_for(rounding, call.matrices[i]->streams[s].columns);
        }
        lay_out();
    }

    Rounding* begin() { return roundings_; }
    Rounding* end() { return roundings_ + count_; }
    Job job(int index, int stream) const {
        return {*call_.matrices[index], stream, of_[index]->orders[order_[index][stream]], of_[index]->scales,
                call_.result(index)};
    }

  private:
    Rounding& rounding_for(const wf_matrix& m) {
        for (Rounding& rounding : *this)
            if (same_col(*rounding.first, m)) return rounding;
        Rounding& made = roundings_[count_++];
        made.first = &m;
        made.batch = call_.batch * m.rank;
        return made;
    }
    static int order_for(Rounding& rounding, const Columns& columns) {
        for (int i = 0; i < rounding.num_orders; ++i)
            if (rounding.orders[i].columns == columns) return i;
        Activations& made = rounding.orders[rounding.num_orders];
        made.columns = columns;
        made.batch = rounding.batch;
        made.tile = TILE / rounding.first->rank * rounding.first->rank;
        return rounding.num_orders++;
    }
    // Goes over everything twice: to add up the sizes, and to say where each part lies.
    void lay_out() {
        size_t used = 0;
        for (Rounding& r : *this) {
            used += lines(r.batch * sizeof(float));
            for (int i = 0; i < r.num_orders; ++i)
                used += lines(data_bytes(r.orders[i])) + lines(sums_bytes(r.orders[i]));
        }
        call_.pool.shared.grow(used);
        uint8_t* at = call_.pool.shared.data();
        for (Rounding& r : *this) {
            r.scales = reinterpret_cast<float*>(std::exchange(at, at + lines(r.batch * sizeof(float))));
            for (int i = 0; i < r.num_orders; ++i) {
                Activations& a = r.orders[i];
                a.data = reinterpret_cast<int8_t*>(std::exchange(at, at + lines(data_bytes(a))));
                a.sums = reinterpret_cast<int32_t*>(std::exchange(at, at + lines(sums_bytes(a))));
            }
        }
    }
    static size_t data_bytes(const Activations& a) { return a.length() * a.batch; }
    static size_t sums_bytes(const Activations& a) {
        return static_cast<size_t>(a.batch) * a.columns.groups * a.columns.num_sums() * sizeof(int32_t);
    }
    static size_t lines(size_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

    const Call& call_;
    int count_ = 0;
    Rounding roundings_[MAX_COUNT];
    Rounding* of_[MAX_COUNT];
    int order_[MAX_COUNT][MAX_STREAMS];
};

void round_token(const Call& call, const Rounding& rounding, int token, uint8_t* scratch) {
    const int rank = rounding.first->rank;
    const float* x = call.x + static_cast<size_t>(token / rank) * call.k;
    const Buffer<float>& col = rounding.first->col;
    auto* scaled = reinterpret_cast<float*>(scratch);
    auto* q = reinterpret_cast<int8_t*>(scaled + call.k);
    if (col.size()) {
        const float* factors = col.data() + static_cast<size_t>(token % rank) * call.k;
        for (int j = 0; j < call.k; ++j) scaled[j] = x[j] * factors[j];
        x = scaled;
    }
    rounding.scales[token] = call.kernels.quantize(x, call.k, q);
    for (int i = 0; i < rounding.num_orders; ++i) spread(q, call.k, rounding.orders[i], token, call.kernels);
}

void round_all(const Call& call, Needs& needs) {
    for (const Rounding& rounding : needs)
        call.pool.each(rounding.batch, 4, [&](int thread, int begin, int end) {
            for (int token = begin; token < end; ++token)
                round_token(call, rounding, token, call.pool.scratch[thread].data());
        });
}

// ---- Panels

float dot_row(const Call& call, const wf_matrix& m, int n, const float* row, const float* x) {
    if (m.weight16.size()) return call.kernels.dot_bf16(m.weight16.data() + static_cast<size_t>(n) * m.k, x, m.k);
    return call.kernels.dot(m.weight32.size() ? m.weight32.data() + static_cast<size_t>(n) * m.k : row, x, m.k);
}

// A panel in fp32. Rows that are not dense are decoded into `scratch` [k].
void exact_panel(const Call& call, const wf_matrix& m, int panel, float* y, float* scratch) {
    const int rows = std::min(PANEL, m.rows() - panel * PANEL);
    for (int part = 0; part < m.parts(); ++part)
        for (int row = 0; row < rows; ++row) {
            const int n = part * m.rows() + panel * PANEL + row;
            if (m.kind != Kind::DENSE) decode_row(m, n, scratch);
            for (int token = 0; token < call.batch; ++token) {
                const float value = dot_row(call, m, n, scratch, call.x + static_cast<size_t>(token) * call.k);
                y[static_cast<size_t>(token) * m.n + n] = m.bias.size() ? value + m.bias[m.padded_row(n)] : value;
            }
        }
}

void exact_panels(const Call& call, int index, int begin, int end, int thread) {
    auto* scratch = reinterpret_cast<float*>(call.pool.scratch[thread].data());
    for (int panel = begin; panel < end; ++panel)
        exact_panel(call, *call.matrices[index], panel, call.result(index), scratch);
}

// ---- A call

// How many panels are a short run: enough to be worth a thread's while, and few enough for threads to end together.
int run_length(const Call& call, int tasks) {
    size_t bytes = 0;
    for (int i = 0; i < call.count; ++i) bytes += call.matrices[i]->read_bytes;
    const size_t least = RUN_BYTES / (bytes / tasks * call.batch + 1) + 1;
    const size_t even = tasks / (static_cast<size_t>(call.pool.threads()) * RUNS_PER_THREAD) + 1;
    return static_cast<int>(std::max(least, even));
}

// Calls body(matrix, first panel, one after the last, thread) for all panels of all matrices, on all threads.
template <class Body>
void each_panel(const Call& call, Body body) {
    int tasks = 0;
    for (int i = 0; i < call.count; ++i) tasks += call.matrices[i]->tasks();
    call.pool.each(tasks, run_length(call, tasks), [&](int thread, int begin, int end) {
        for (int i = 0, first = 0; i < call.count && first < end; first += call.matrices[i++]->tasks()) {
            const wf_matrix& m = *call.matrices[i];
            const int from = std::max(begin - first, 0), to = std::min(end - first, m.tasks());
            const int panels = m.panels_in_task();
            if (from < to) body(i, from * panels, std::min(to * panels, m.panels()), thread);
        }
    });
}

void run_rounded(const Call& call) {
    Needs needs(call);
    round_all(call, needs);
    each_panel(call, [&](int index, int begin, int end, int thread) {
        const wf_matrix& m = *call.matrices[index];
        if (m.kind == Kind::DENSE) return exact_panels(call, index, begin, end, thread);
        for (size_t stream = 0; stream < m.streams.size(); ++stream)
            call.kernels.product(needs.job(index, static_cast<int>(stream)), begin, end);
    });
}

void run_exact(const Call& call) {
    each_panel(call, [&](int index, int begin, int end, int thread) { exact_panels(call, index, begin, end, thread); });
}

// How many tokens to work on at a time: their activations should stay in the second-level cache.
int block(const wf_matrix* const* matrices, int count) {
    int rank = 1;
    bool planes = false;
    for (int i = 0; i < count; ++i) {
        rank = std::max(rank, matrices[i]->rank);
        planes = planes || matrices[i]->panels_in_task() > 1;
    }
    return (planes ? MAX_TOKENS_OF_TABLES : MAX_TOKENS) / rank;
}

void run(wf_pool& pool, const wf_matrix* const* matrices, int count, const float* x, int batch, float* const* y,
         wf_mode mode) {
    std::lock_guard<std::mutex> turn(pool.turn);
    const int k = matrices[0]->k, most = block(matrices, count);
    // Scratch holds a decoded row, or a scaled token and its bytes.
    for (auto& scratch : pool.scratch) scratch.grow(static_cast<size_t>(k) * (sizeof(float) + 1));
    for (int first = 0; first < batch; first += most) {
        const Call call{pool,
                        kernels(),
                        matrices,
                        count,
                        k,
                        x + static_cast<size_t>(first) * k,
                        std::min(most, batch - first),
                        y,
                        static_cast<size_t>(first)};
        mode == WF_EXACT ? run_exact(call) : run_rounded(call);
    }
}

}  // namespace
}  // namespace wf

extern "C" int wf_matmul(wf_pool* pool, const wf_matrix* const* matrices, int count, const float* x, int batch,
                         float* const* y, enum wf_mode mode) {
    return wf::guarded(1, [&] {
        wf::check(pool && matrices && x && y, "pool, matrices, x, y: must be given");
        wf::check(count >= 1 && count <= wf::MAX_COUNT, "count: must be 1 to 8");
        wf::check(batch >= 0 && static_cast<size_t>(batch) <= wf::MAX_BATCH, "batch: must be 0 to 1048576");
        wf::check(mode == WF_INT8 || mode == WF_EXACT, "mode: unknown");
        for (int i = 0; i < count; ++i) {
            wf::check(matrices[i] && y[i], "matrices, y: an entry is missing");
            wf::check(matrices[i]->k == matrices[0]->k, "matrices: their widths differ");
        }
        wf::run(*pool, matrices, count, x, batch, y, mode);
        return 0;
    });
}
