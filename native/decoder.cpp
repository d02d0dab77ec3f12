// The native decoder: a pass through a Llama for tokens of several sequences. decoder.h says what it promises.
//
// A row is a token, in the order of the appends: x [rows, hidden]. A layer is
//
//     n = norm(x)    x += o(attention(q(n), k(n), v(n)))
//     m = norm(x)    x += down(act(gate(m)) * up(m))
//
// Some models norm what is added to x, too. With experts, the MLP is a sum over those that a router chooses. Threads are
// started five times for a layer: for q, k and v together, for attention, for o, for gate and up together, and for
// down; and twice for each expert. The loops in between run on the calling thread if there are few rows, else on all threads.
#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <new>

#include "cache.h"
#include "common.h"
#include "layout.h"
#include "pool.h"
#include "sampling.h"

namespace wf {
namespace {

constexpr int MAX_HEAD_DIM = 256;
// Multiply-adds, more or less. With fewer, waking the threads costs more than they save.
constexpr int64_t WORTH_THREADS = 1 << 16;

struct Linear {
    const wf_matrix* matrix;
    std::vector<float> gain;
    std::vector<float> signs;  // of a rotation, times what makes it orthogonal; empty if there is none
    float eps;
    bool rounded;
    int out, in;
};

// A norm of [hidden]; it does nothing if there is no gain.
struct Norm {
    std::vector<float> gain, shift;
};

struct Mlp {
    Linear gate, up, down;  // `up` has no matrix if `gate` holds both, or if there is none
    int intermediate;
};

struct Layer {
    Linear q, k, v, o, router;
    Mlp mlp;
    std::vector<Mlp> experts;
    Norm attention_norm, mlp_norm, post_attention_norm, post_mlp_norm;
    std::vector<float> q_norm, k_norm;
    int rope, window;
    float scale;
};

// Rows that go to an expert, with their probabilities.
struct Choice {
    int row;
    float share;
};

struct Sequence {
    explicit Sequence(const CacheShape& shape) : cache(shape) {}
    std::vector<int32_t> tokens;
    Cache cache;
};

struct Row {
    int slot, position;
};

// Attention for one head of the keys, of rows that follow each other in one sequence.
struct Task {
    int row, count;  // the first row of q, and how many
    int head, out;   // the head, and the first row of the result
};

// Throws if a function of wf.h has reported an error.
void check_call(int code) {
    if (code) fail(wf_error());
}

std::vector<float> copied(const float* values, int n) {
    return values ? std::vector<float>(values, values + n) : std::vector<float>();
}

}  // namespace
}  // namespace wf

using namespace wf;

struct wf_decoder {
    wf_decoder(wf_pool* pool, const wf_model& model);

    void step(const wf_append* appends, int count);
    size_t bytes() const;

    std::mutex mutex;
    wf_model m;  // matrices are borrowed; other pointers are not used after the constructor
    std::vector<Sequence> sequences;

  private:
    const char* fault(const wf_append* appends, int count) const;
    void lay_out(const wf_append* appends, int count);
    void embed(const wf_append* appends, int count);
    void run_layers();
    void attention_block(const Layer& layer, int index, bool last);
    void mlp_block(const Layer& layer);
    void run_mlp(const Mlp& mlp, const float* x, int rows, float* y);
    void run_experts(const Layer& layer);
    void choose_experts(const float* scores, int row);
    void norm_row(const Norm& norm, const float* x, float* y) const;
    void add_row(const Norm& norm, float* from, float* to) const;
    void split_fused(int row);
    void keep_wanted();
    void finish(const wf_append* appends, int count);
    static int wanted_of(const wf_append& a) { return a.logits ? std::max(a.num_logits, 1) : a.next ? 1 : 0; }
    void apply(std::initializer_list<const Linear*> group, const float* x, int rows,
               std::initializer_list<float*> outs);
    void apply_alike(const Linear* const* group, int count, const float* x, int rows, float* const* outs);
    const float* prepared(const Linear& linear, const float* x, int rows);
    void rotate_and_store(const Layer& layer, int index, int row);
    void attend(const Layer& layer, int index, const Task& task);
    void list_tasks(bool last);
    size_t fused_width() const;
    template <class F>
    void each(int tasks, int64_t work, const F& f);

    const Vectors& loops_;
    wf_pool* pool_;
    CacheShape shape_;
    std::vector<Layer> layers_;
    std::vector<float> frequencies_;
    Norm norm_;
    Linear head_;
    Sampler sampler_;
    int q_width_, kv_width_, inner_width_;

    // What belongs to the step that runs.
    std::vector<Row> rows_;
    std::vector<int> wanted_;  // rows whose logits or next tokens are asked for
    std::vector<Task> tasks_;
    std::vector<std::vector<Choice>> chosen_;  // of each expert
    std::vector<int> order_;                   // of experts, by their probabilities
    int64_t attention_work_ = 0;
    int num_rows_ = 0;
    // private_inputs_: inputs of layers that norm, rotate or round them.
    Buffer<float> x_, n_, private_inputs_, q_, k_, v_, a_, gate_, up_, cosine_, sine_, logits_;
    Buffer<float> fused_;                            // what one matrix gives for several
    Buffer<float> scores_, given_, expert_, mixed_;  // of experts: their probabilities, inputs, results and sums
};

namespace {

// The largest power of 4 up to 256 that divides `width`, as in core/rotation.py.
int rotation_block(int width) {
    int block = 256;
    while (width % block) block /= 4;
    return block;
}

// The signs of a rotation of `width` columns, as in core/rotation.py, times 1 / sqrt(block).
std::vector<float> signs_of(int width) {
    std::vector<float> signs(width);
    const float size = 1 / std::sqrt(static_cast<float>(rotation_block(width)));
    for (uint64_t i = 0; i < signs.size(); i++) signs[i] = i * 2654435761u >> 13 & 1 ? -size : size;
    return signs;
}

Linear linear_of(const wf_linear& l) {
    if (!l.matrix) return {};
    int in = l.matrix->k, out = l.matrix->n;
    std::vector<float> signs = l.rotated ? signs_of(in) : std::vector<float>();
    return {l.matrix, copied(l.gain, in), std::move(signs), l.eps, l.rounded != 0, out, in};
}

Mlp mlp_of(const wf_linear& gate, const wf_linear& up, const wf_linear& down) {
    return {linear_of(gate), linear_of(up), linear_of(down), down.matrix ? down.matrix->k : 0};
}

Layer layer_of(const wf_layer& l, const wf_model& m) {
    const auto norm_of = [&](const float* gain, const float* shift) {
        return Norm{copied(gain, m.hidden), copied(shift, m.hidden)};
    };
    Layer layer{linear_of(l.q),
                linear_of(l.k),
                linear_of(l.v),
                linear_of(l.o),
                linear_of(l.router),
                mlp_of(l.gate, l.up, l.down),
                {},
                norm_of(l.attention_norm, l.attention_shift),
                norm_of(l.mlp_norm, l.mlp_shift),
                norm_of(l.post_attention_norm, nullptr),
                norm_of(l.post_mlp_norm, nullptr),
                copied(l.q_norm, m.head_dim),
                copied(l.k_norm, m.head_dim),
                l.rope,
                l.window,
                l.scale};
    for (int e = 0; l.experts && e < m.num_experts; e++) {
        const wf_linear* expert = l.experts + 3 * e;
        layer.experts.push_back(mlp_of(expert[0], expert[1], expert[2]));
    }
    return layer;
}

// What is wrong with the sizes of a model, or nullptr.
const char* size_fault(const wf_model& m) {
    constexpr int most = 1 << 26;
    for (int size : {m.vocab, m.hidden, m.intermediate, m.num_layers, m.heads, m.kv_heads, m.head_dim, m.context,
                     m.slots, m.max_rows})
        if (size < 1 || size > most) return "decoder: a size is not between 1 and 2^26";
    if (m.num_layers > 4096 || m.slots > 4096 || m.max_rows > 65536) return "decoder: too many layers, slots or rows";
    if (m.head_dim % 2 || m.head_dim > MAX_HEAD_DIM) return "decoder: head_dim has to be even and at most 256";
    if (m.rotary < 0 || m.rotary % 2 || m.rotary > m.head_dim) return "decoder: rotary has to be even, in a head";
    if (m.num_experts < 0 || m.num_experts > 65536 || m.expert_intermediate < 0 || m.expert_intermediate > most ||
        m.top_k < 0 || m.top_k > m.num_experts || (m.num_experts && (!m.top_k || !m.expert_intermediate)))
        return "decoder: the numbers of experts do not go together";
    if (m.num_ropes < 0 || m.num_ropes > 2) return "decoder: num_ropes is not 0 to 2";
    if (m.heads % m.kv_heads || m.heads / m.kv_heads > QUERIES)
        return "decoder: heads have to be 1 to 32 times kv_heads";
    if (static_cast<int64_t>(m.heads) * m.head_dim > most) return "decoder: heads are too wide";
    for (float number : {m.eps, m.rope_scale[0], m.rope_scale[1], m.embedding_scale})
        if (!std::isfinite(number) || m.eps < 0) return "decoder: eps and scales have to be numbers";
    if (m.activation < WF_SILU || m.activation > WF_GELU_TANH) return "decoder: unknown activation";
    if (m.mode != WF_INT8 && m.mode != WF_EXACT) return "decoder: unknown mode";
    if ((m.num_ropes && !m.frequencies) || !m.embedding || !m.norm || !m.layers) return "decoder: a pointer is NULL";
    return nullptr;
}

bool fits(const wf_linear& l, int out, int in) {
    return l.matrix && l.matrix->n == out && l.matrix->k == in && (!l.gain || l.eps >= 0);
}

bool mlp_fits(const wf_linear& gate, const wf_linear& up, const wf_linear& down, int inner, int hidden) {
    const bool apart = up.matrix ? fits(gate, inner, hidden) && fits(up, inner, hidden)
                                 : fits(gate, inner, hidden) || fits(gate, 2 * inner, hidden);
    return apart && fits(down, hidden, inner);
}

bool attention_fits(const wf_layer& l, const wf_model& m) {
    const int q = m.heads * m.head_dim, kv = m.kv_heads * m.head_dim;
    const bool apart = fits(l.q, q, m.hidden) && fits(l.k, kv, m.hidden) && fits(l.v, kv, m.hidden);
    const bool fused = !l.k.matrix && !l.v.matrix && fits(l.q, q + 2 * kv, m.hidden);
    return (apart || fused) && fits(l.o, m.hidden, q);
}

bool experts_fit(const wf_layer& l, const wf_model& m) {
    bool fit = fits(l.router, m.num_experts, m.hidden) && !l.gate.matrix && !l.up.matrix && !l.down.matrix;
    for (int e = 0; e < m.num_experts; e++) {
        const wf_linear* expert = l.experts + 3 * e;
        fit = fit && mlp_fits(expert[0], expert[1], expert[2], m.expert_intermediate, m.hidden);
    }
    return fit;
}

const char* layer_fault(const wf_layer& l, const wf_model& m) {
    const bool inner = l.experts ? experts_fit(l, m) : mlp_fits(l.gate, l.up, l.down, m.intermediate, m.hidden);
    if (!attention_fits(l, m) || !inner) return "decoder: a layer's matrix is missing or has the wrong shape";
    if (!l.attention_norm || !l.mlp_norm) return "decoder: a layer has no norm";
    if (l.window < 0) return "decoder: a layer's window is below 0";
    if (l.rope < 0 || l.rope > m.num_ropes) return "decoder: a layer's rope has no frequencies";
    if (!std::isfinite(l.scale)) return "decoder: a layer's scale has to be a number";
    return nullptr;
}

const char* model_fault(const wf_model& m) {
    if (const char* fault = size_fault(m)) return fault;
    for (int i = 0; i < m.num_layers; i++)
        if (const char* fault = layer_fault(m.layers[i], m)) return fault;
    if (!fits(m.head, m.vocab, m.hidden)) return "decoder: the head is missing or has the wrong shape";
    if (m.embedding->n != m.vocab || m.embedding->k != m.hidden) return "decoder: the embedding has the wrong shape";
    if (m.positions && (m.positions->n < m.context || m.positions->k != m.hidden))
        return "decoder: the positions have the wrong shape";
    std::vector<float> row(m.hidden);
    if (wf_matrix_row(m.embedding, 0, row.data())) return "decoder: the embedding's matrix has no rows to read";
    if (m.positions && wf_matrix_row(m.positions, 0, row.data())) return "decoder: the positions have no rows to read";
    return nullptr;
}

}  // namespace

wf_decoder::wf_decoder(wf_pool* pool, const wf_model& model)
    : m(model),
      loops_(vectors()),
      pool_(pool),
      shape_{model.num_layers, model.kv_heads, model.head_dim, model.half_cache != 0},
      frequencies_(copied(model.frequencies, model.num_ropes * (model.rotary / 2))),
      norm_{copied(model.norm, model.hidden), copied(model.shift, model.hidden)},
      head_(linear_of(model.head)),
      sampler_(model.vocab),
      q_width_(model.heads * model.head_dim),
      kv_width_(model.kv_heads * model.head_dim),
      inner_width_(std::max(model.intermediate, model.expert_intermediate)) {
    for (int i = 0; i < m.num_layers; i++) layers_.push_back(layer_of(m.layers[i], m));
    sequences.reserve(m.slots);
    for (int i = 0; i < m.slots; i++) sequences.emplace_back(shape_);
    size_t rows = m.max_rows;
    for (Buffer<float>* b : {&x_, &n_}) b->reset(rows * m.hidden);
    private_inputs_.reset(rows * std::max({m.hidden, inner_width_, q_width_}));
    for (Buffer<float>* b : {&q_, &a_}) b->reset(rows * q_width_);
    for (Buffer<float>* b : {&k_, &v_}) b->reset(rows * kv_width_);
    for (Buffer<float>* b : {&gate_, &up_}) b->reset(rows * inner_width_);
    for (Buffer<float>* b : {&cosine_, &sine_}) b->reset(rows * m.num_ropes * (m.rotary / 2));
    fused_.reset(rows * fused_width());
    chosen_.resize(m.num_experts);
    order_.resize(m.num_experts);
    scores_.reset(rows * m.num_experts);
    for (Buffer<float>* b : {&given_, &expert_, &mixed_}) b->reset(m.num_experts ? rows * m.hidden : 0);
    logits_.reset(static_cast<size_t>(m.slots) * m.vocab);
}

// The most that one matrix gives for several, 0 if there is no such matrix.
size_t wf_decoder::fused_width() const {
    int most = 0;
    const auto widen = [&](const Mlp& mlp) {
        if (mlp.gate.matrix && mlp.gate.out > mlp.intermediate) most = std::max(most, mlp.gate.out);
    };
    for (const Layer& layer : layers_) {
        if (!layer.k.matrix) most = std::max(most, layer.q.out);
        widen(layer.mlp);
        for (const Mlp& expert : layer.experts) widen(expert);
    }
    return most;
}

size_t wf_decoder::bytes() const {
    size_t total = 0;
    for (const Buffer<float>* b : {&x_, &n_, &private_inputs_, &q_, &k_, &v_, &a_, &gate_, &up_, &cosine_, &sine_,
                                   &logits_, &fused_, &scores_, &given_, &expert_, &mixed_})
        total += b->bytes();
    for (const Sequence& s : sequences) total += s.cache.bytes();
    return total;
}

template <class F>
void wf_decoder::each(int tasks, int64_t work, const F& f) {
    if (tasks > 1 && work >= WORTH_THREADS) {
        std::lock_guard<std::mutex> lock(pool_->turn);
        pool_->each(tasks, std::max(1, tasks / (8 * pool_->threads())), [&](int, int begin, int end) {
            for (int i = begin; i < end; i++) f(i);
        });
    } else {
        for (int i = 0; i < tasks; i++) f(i);
    }
}

const char* wf_decoder::fault(const wf_append* appends, int count) const {
    if (count < 1 || count > m.slots || !appends) return "step: needs between one append and one for each slot";
    int64_t rows = 0;
    std::vector<bool> taken(m.slots);
    for (int i = 0; i < count; i++) {
        const wf_append& a = appends[i];
        if (a.slot < 0 || a.slot >= m.slots || taken[a.slot]) return "step: a slot is unknown or stands there twice";
        taken[a.slot] = true;
        if (a.length < 1 || !a.tokens) return "step: an append has no tokens";
        if (a.length > m.context - static_cast<int>(sequences[a.slot].tokens.size()))
            return "step: the context is full";
        for (int t = 0; t < a.length; t++)
            if (a.tokens[t] < 0 || a.tokens[t] >= m.vocab) return "step: a token id is not in the vocabulary";
        if (a.num_logits < 0 || a.num_logits > a.length) return "step: more logits than tokens";
        if (a.next && !a.sampling) return "step: the next token is asked for without saying how to choose it";
        if (a.next)
            if (const char* wrong = sampling_fault(*a.sampling, m.vocab)) return wrong;
        rows += a.length;
    }
    return rows > m.max_rows ? "step: more tokens than max_rows" : nullptr;
}

// Lists the rows and which of them are wanted, makes room in the caches, and works out sines and cosines.
void wf_decoder::lay_out(const wf_append* appends, int count) {
    rows_.clear();
    wanted_.clear();
    for (int i = 0; i < count; i++) {
        const wf_append& a = appends[i];
        Sequence& s = sequences[a.slot];
        int length = static_cast<int>(s.tokens.size());
        check(s.cache.grow(length + a.length), "step: no memory for more keys and values");
        s.tokens.reserve(length + a.length);
        for (int t = 0; t < a.length; t++) rows_.push_back({a.slot, length + t});
        for (int t = wanted_of(a); t > 0; t--) wanted_.push_back(static_cast<int>(rows_.size()) - t);
    }
    num_rows_ = static_cast<int>(rows_.size());
    logits_.grow(wanted_.size() * m.vocab);
    const int half = m.rotary / 2, angles = m.num_ropes * half;
    each(num_rows_, static_cast<int64_t>(num_rows_) * angles * 64, [&](int row) {
        for (int j = 0; j < angles; j++) {
            float angle = static_cast<float>(rows_[row].position) * frequencies_[j];
            cosine_.data()[row * angles + j] = std::cos(angle) * m.rope_scale[j / half];
            sine_.data()[row * angles + j] = std::sin(angle) * m.rope_scale[j / half];
        }
    });
    list_tasks(false);
}

// Makes a task for each head of the keys and for as many rows of a sequence as `QUERIES` allows. The last layer needs
// wanted rows only.
void wf_decoder::list_tasks(bool last) {
    tasks_.clear();
    attention_work_ = 0;
    int most = std::max(1, QUERIES / (m.heads / m.kv_heads));
    int num = last ? static_cast<int>(wanted_.size()) : num_rows_;
    for (int out = 0; out < num;) {
        int row = last ? wanted_[out] : out, rows = 1;
        while (!last && rows < most && row + rows < num && rows_[row + rows].slot == rows_[row].slot) rows++;
        for (int head = 0; head < m.kv_heads; head++) tasks_.push_back({row, rows, head, out});
        attention_work_ += static_cast<int64_t>(rows) * (rows_[row].position + 1) * q_width_ * 2;
        out += rows;
    }
}

void wf_decoder::step(const wf_append* appends, int count) {
    if (const char* wrong = fault(appends, count)) fail(wrong);
    lay_out(appends, count);
    embed(appends, count);
    run_layers();
    finish(appends, count);
}

void wf_decoder::embed(const wf_append* appends, int count) {
    float *x = x_.data(), *position = n_.data();
    const Row* row = rows_.data();
    for (int i = 0; i < count; i++)
        for (int t = 0; t < appends[i].length; t++, x += m.hidden, row++) {
            check_call(wf_matrix_row(m.embedding, appends[i].tokens[t], x));
            if (m.embedding_scale != 1)
                for (int j = 0; j < m.hidden; j++) x[j] *= m.embedding_scale;
            if (!m.positions) continue;
            check_call(wf_matrix_row(m.positions, row->position, position));
            loops_.add(position, m.hidden, x);
        }
}

void wf_decoder::run_layers() {
    for (int i = 0; i < m.num_layers; i++) {
        const Layer& layer = layers_[i];
        attention_block(layer, i, i + 1 == m.num_layers);
        if (num_rows_ == 0) return;
        mlp_block(layer);
    }
}

void wf_decoder::norm_row(const Norm& norm, const float* x, float* y) const {
    if (m.layer_norm)
        loops_.layer_norm(x, norm.gain.data(), norm.shift.empty() ? nullptr : norm.shift.data(), m.eps, m.hidden, y);
    else
        loops_.norm(x, norm.gain.data(), m.eps, m.hidden, y);
}

// to += from, normed if there is a norm for it.
void wf_decoder::add_row(const Norm& norm, float* from, float* to) const {
    if (!norm.gain.empty()) norm_row(norm, from, from);
    loops_.add(from, m.hidden, to);
}

void wf_decoder::attention_block(const Layer& layer, int index, bool last) {
    int64_t work = static_cast<int64_t>(num_rows_) * m.hidden * 2;
    each(num_rows_, work, [&](int row) {
        size_t at = static_cast<size_t>(row) * m.hidden;
        norm_row(layer.attention_norm, x_.data() + at, n_.data() + at);
    });
    const bool fused = !layer.k.matrix;
    if (fused)
        apply({&layer.q}, n_.data(), num_rows_, {fused_.data()});
    else
        apply({&layer.q, &layer.k, &layer.v}, n_.data(), num_rows_, {q_.data(), k_.data(), v_.data()});
    each(num_rows_, work * 4, [&](int row) {
        if (fused) split_fused(row);
        rotate_and_store(layer, index, row);
    });
    if (last) keep_wanted();
    each(static_cast<int>(tasks_.size()), attention_work_, [&](int i) { attend(layer, index, tasks_[i]); });
    if (num_rows_ == 0) return;
    apply({&layer.o}, a_.data(), num_rows_, {n_.data()});
    each(num_rows_, work, [&](int row) {
        size_t at = static_cast<size_t>(row) * m.hidden;
        add_row(layer.post_attention_norm, n_.data() + at, x_.data() + at);
        norm_row(layer.mlp_norm, x_.data() + at, n_.data() + at);
    });
}

// Puts queries, keys and values where they would be if each had a matrix.
void wf_decoder::split_fused(int row) {
    const float* from = fused_.data() + static_cast<size_t>(row) * (q_width_ + 2 * kv_width_);
    std::copy_n(from, q_width_, q_.data() + static_cast<size_t>(row) * q_width_);
    std::copy_n(from + q_width_, kv_width_, k_.data() + static_cast<size_t>(row) * kv_width_);
    std::copy_n(from + q_width_ + kv_width_, kv_width_, v_.data() + static_cast<size_t>(row) * kv_width_);
}

void wf_decoder::mlp_block(const Layer& layer) {
    if (layer.experts.empty())
        run_mlp(layer.mlp, n_.data(), num_rows_, n_.data());
    else
        run_experts(layer);
    each(num_rows_, static_cast<int64_t>(num_rows_) * m.hidden, [&](int row) {
        size_t at = static_cast<size_t>(row) * m.hidden;
        add_row(layer.post_mlp_norm, n_.data() + at, x_.data() + at);
    });
}

// y = down(act(gate x) * up x) for so many rows; y may be x.
void wf_decoder::run_mlp(const Mlp& mlp, const float* x, int rows, float* y) {
    const int inner = mlp.intermediate, width = mlp.gate.out;
    const bool fused = width > inner, gated = fused || mlp.up.matrix;
    float* gate = fused ? fused_.data() : gate_.data();
    if (mlp.up.matrix)
        apply({&mlp.gate, &mlp.up}, x, rows, {gate, up_.data()});
    else
        apply({&mlp.gate}, x, rows, {gate});
    auto act = m.activation == WF_SILU    ? loops_.silu_times
               : m.activation == WF_RELU2 ? loops_.relu2_times
                                          : loops_.gelu_times;
    each(rows, static_cast<int64_t>(rows) * inner * 4, [&](int row) {
        const float* from = gate + static_cast<size_t>(row) * width;
        const size_t at = static_cast<size_t>(row) * inner;
        act(from, !gated ? nullptr : fused ? from + inner : up_.data() + at, inner, gate_.data() + at);
    });
    apply({&mlp.down}, gate_.data(), rows, {y});
}

// n = the sum over each row's experts. They come in the order of their numbers, so a row's sum has the same bits
// whatever other rows there are.
void wf_decoder::run_experts(const Layer& layer) {
    const size_t hidden = m.hidden;
    for (auto& rows : chosen_) rows.clear();
    apply({&layer.router}, n_.data(), num_rows_, {scores_.data()});
    for (int row = 0; row < num_rows_; row++)
        choose_experts(scores_.data() + static_cast<size_t>(row) * m.num_experts, row);
    std::fill_n(mixed_.data(), num_rows_ * hidden, 0.0f);
    for (int e = 0; e < m.num_experts; e++) {
        const int rows = static_cast<int>(chosen_[e].size());
        if (!rows) continue;
        for (int i = 0; i < rows; i++)
            std::copy_n(n_.data() + chosen_[e][i].row * hidden, hidden, given_.data() + i * hidden);
        run_mlp(layer.experts[e], given_.data(), rows, expert_.data());
        for (int i = 0; i < rows; i++)
            loops_.add_times(expert_.data() + i * hidden, chosen_[e][i].share, m.hidden,
                             mixed_.data() + chosen_[e][i].row * hidden);
    }
    std::copy_n(mixed_.data(), num_rows_ * hidden, n_.data());
}

// Lists the row at the `top_k` experts with the largest scores, the lower number first if two are alike. NaN comes last.
void wf_decoder::choose_experts(const float* scores, int row) {
    for (int e = 0; e < m.num_experts; e++) order_[e] = e;
    const auto before = [&](int a, int b) {
        const bool number_a = !std::isnan(scores[a]), number_b = !std::isnan(scores[b]);
        if (number_a != number_b) return number_a;
        return number_a && scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    };
    std::partial_sort(order_.begin(), order_.begin() + m.top_k, order_.end(), before);
    const float peak = scores[order_[0]];
    float total = 0;
    const int counted = m.share_of_chosen ? m.top_k : m.num_experts;
    for (int i = 0; i < counted; i++) total += std::exp(scores[m.share_of_chosen ? order_[i] : i] - peak);
    for (int i = 0; i < m.top_k; i++) chosen_[order_[i]].push_back({row, std::exp(scores[order_[i]] - peak) / total});
}

// Drops all rows but the wanted ones. In the last layer nothing more is needed of the others: their keys and values are
// stored.
void wf_decoder::keep_wanted() {
    list_tasks(true);
    for (size_t i = 0; i < wanted_.size(); i++)
        std::copy_n(x_.data() + static_cast<size_t>(wanted_[i]) * m.hidden, m.hidden, x_.data() + i * m.hidden);
    num_rows_ = static_cast<int>(wanted_.size());
}

// Whether both layers take the same inputs: those that the group is given, or the same made of them.
bool alike(const Linear& a, const Linear& b) {
    return a.gain.empty() && b.gain.empty() && a.signs.empty() == b.signs.empty() && a.rounded == b.rounded;
}

// Applies several layers to one input. Layers that do the same to it share a call.
void wf_decoder::apply(std::initializer_list<const Linear*> group, const float* x, int rows,
                       std::initializer_list<float*> outs) {
    const Linear& first = **group.begin();
    bool together = true;
    for (const Linear* linear : group) together = together && alike(first, *linear);
    if (group.size() == 1 || together)
        return apply_alike(group.begin(), static_cast<int>(group.size()), x, rows, outs.begin());
    float* const* out = outs.begin();
    for (const Linear* linear : group) apply_alike(&linear, 1, x, rows, out++);
}

void wf_decoder::apply_alike(const Linear* const* group, int count, const float* x, int rows, float* const* outs) {
    const wf_matrix* matrices[3];
    for (int i = 0; i < count; i++) matrices[i] = group[i]->matrix;
    check_call(wf_matmul(pool_, matrices, count, prepared(**group, x, rows), rows, outs, m.mode));
}

// What a layer makes of its inputs [rows, in] before the product.
const float* wf_decoder::prepared(const Linear& linear, const float* x, int rows) {
    const bool rounds = linear.rounded && m.mode == WF_EXACT;
    if (linear.gain.empty() && linear.signs.empty() && !rounds) return x;
    const int block = rotation_block(linear.in);
    each(rows, static_cast<int64_t>(rows) * linear.in * (linear.signs.empty() ? 2 : 8), [&](int row) {
        size_t at = static_cast<size_t>(row) * linear.in;
        const float* from = x + at;
        float* to = private_inputs_.data() + at;
        if (!linear.gain.empty()) loops_.norm(from, linear.gain.data(), linear.eps, linear.in, to), from = to;
        if (!linear.signs.empty()) loops_.hadamard(from, linear.signs.data(), linear.in, block, to), from = to;
        if (rounds) loops_.round8(from, linear.in, to);
    });
    return private_inputs_.data();
}

// Norms the heads of q and k, rotates them by the row's position, and stores k and v in the cache.
void wf_decoder::rotate_and_store(const Layer& layer, int index, int row) {
    const int d = m.head_dim, half = m.rotary / 2, place = rows_[row].position % PAGE;
    float* q = q_.data() + static_cast<size_t>(row) * q_width_;
    float* k = k_.data() + static_cast<size_t>(row) * kv_width_;
    const float* v = v_.data() + static_cast<size_t>(row) * kv_width_;
    const size_t angles = static_cast<size_t>(row) * m.num_ropes * half + std::max(layer.rope - 1, 0) * half;
    const float *cosine = cosine_.data() + angles, *sine = sine_.data() + angles;
    auto prepare = [&](float* head, const std::vector<float>& gain) {
        if (!gain.empty()) loops_.norm(head, gain.data(), m.eps, d, head);
        if (layer.rope) loops_.rotate(cosine, sine, half, head);
    };
    for (int h = 0; h < m.heads; h++) prepare(q + h * d, layer.q_norm);
    char* page = sequences[rows_[row].slot].cache.pages()[rows_[row].position / PAGE];
    for (int h = 0; h < m.kv_heads; h++) {
        prepare(k + h * d, layer.k_norm);
        loops_.store_key(k + h * d, d, shape_.bf16, place, page + shape_.keys_at(index, h));
        loops_.store_value(v + h * d, d, shape_.padded_dim(), shape_.bf16, place, page + shape_.values_at(index, h));
    }
}

void wf_decoder::attend(const Layer& layer, int index, const Task& task) {
    alignas(64) float q[QUERIES * MAX_HEAD_DIM], out[QUERIES * MAX_HEAD_DIM];
    int begin[QUERIES], end[QUERIES];
    int d = m.head_dim, group = m.heads / m.kv_heads, padded = shape_.padded_dim(), n = 0;
    for (int r = 0; r < task.count; r++)
        for (int g = 0; g < group; g++, n++) {
            const float* from = q_.data() + static_cast<size_t>(task.row + r) * q_width_ + (task.head * group + g) * d;
            for (int i = 0; i < d; i++) q[n * d + i] = from[i] * layer.scale;
            end[n] = rows_[task.row + r].position + 1;
            begin[n] = layer.window && layer.window < end[n] ? end[n] - layer.window : 0;
        }
    const Cache& cache = sequences[rows_[task.row].slot].cache;
    Attend a{d,
             padded,
             n,
             begin[0] / PAGE,
             (end[n - 1] + PAGE - 1) / PAGE,
             cache.pages(),
             shape_.keys_at(index, task.head),
             shape_.values_at(index, task.head),
             begin,
             end,
             q,
             out};
    (shape_.bf16 ? loops_.attend_bf16 : loops_.attend_float)(a);
    n = 0;
    for (int r = 0; r < task.count; r++)
        for (int g = 0; g < group; g++, n++)
            std::copy_n(out + n * padded, d,
                        a_.data() + static_cast<size_t>(task.out + r) * q_width_ + (task.head * group + g) * d);
}

// Works out the logits of the wanted rows, lengthens the sequences, and chooses tokens. After the
// product nothing can fail: an error leaves all sequences as they were.
void wf_decoder::finish(const wf_append* appends, int count) {
    for (int i = 0; i < num_rows_; i++) {
        float* x = x_.data() + static_cast<size_t>(i) * m.hidden;
        norm_row(norm_, x, x);
    }
    if (num_rows_) apply({&head_}, x_.data(), num_rows_, {logits_.data()});
    float* logits = logits_.data();
    for (int i = 0; i < count; i++) {
        const wf_append& a = appends[i];
        std::vector<int32_t>& tokens = sequences[a.slot].tokens;
        tokens.insert(tokens.end(), a.tokens, a.tokens + a.length);
        const size_t wanted = wanted_of(a);
        if (!wanted) continue;
        if (a.logits) std::copy_n(logits, wanted * m.vocab, a.logits);
        logits += wanted * m.vocab;
        if (a.next)
            *a.next = sampler_.choose(logits - m.vocab, tokens.data(), static_cast<int>(tokens.size()), *a.sampling);
    }
}

namespace {

wf_decoder& known(wf_decoder* d, int slot) {
    check(d && slot >= 0 && slot < d->m.slots, "decoder: no such slot");
    return *d;
}

}  // namespace

wf_decoder* wf_decoder_new(wf_pool* pool, const wf_model* model) {
    return guarded<wf_decoder*>(nullptr, [&] {
        check(pool && model, "decoder: a pointer is NULL");
        if (const char* wrong = model_fault(*model)) fail(wrong);
        return new wf_decoder(pool, *model);
    });
}

void wf_decoder_free(wf_decoder* d) { delete d; }

int wf_decoder_step(wf_decoder* d, const wf_append* appends, int count) {
    return guarded(1, [&] {
        check(d, "step: no decoder");
        std::lock_guard<std::mutex> lock(d->mutex);
        d->step(appends, count);
        return 0;
    });
}

int wf_decoder_length(wf_decoder* d, int slot) {
    return guarded(-1, [&] {
        std::lock_guard<std::mutex> lock(known(d, slot).mutex);
        return static_cast<int>(d->sequences[slot].tokens.size());
    });
}

int wf_decoder_truncate(wf_decoder* d, int slot, int length) {
    return guarded(1, [&] {
        std::lock_guard<std::mutex> lock(known(d, slot).mutex);
        std::vector<int32_t>& tokens = d->sequences[slot].tokens;
        check(length >= 0 && length <= static_cast<int>(tokens.size()), "truncate: a length that the slot has not");
        tokens.resize(length);
        return 0;
    });
}

int wf_decoder_clear(wf_decoder* d, int slot) {
    return guarded(1, [&] {
        std::lock_guard<std::mutex> lock(known(d, slot).mutex);
        d->sequences[slot].tokens.clear();
        d->sequences[slot].cache.clear();
        return 0;
    });
}

int wf_decoder_copy(wf_decoder* d, int from, int to, int length) {
    return guarded(1, [&] {
        std::lock_guard<std::mutex> lock(known(d, from).mutex);
        Sequence &source = d->sequences[from], &target = known(d, to).sequences[to];
        check(from != to && length >= 0 && length <= static_cast<int>(source.tokens.size()),
              "copy: a length that the slot has not");
        check(target.cache.grow(length), "copy: no memory for more keys and values");
        target.cache.copy(source.cache, length);
        target.tokens.assign(source.tokens.begin(), source.tokens.begin() + length);
        return 0;
    });
}

size_t wf_decoder_bytes(wf_decoder* d) {
    if (!d) return 0;
    std::lock_guard<std::mutex> lock(d->mutex);
    return d->bytes();
}

int32_t wf_sample(const float* logits, int vocab, const int32_t* history, int length, const wf_sampling* sampling) {
    return guarded(-1, [&] {
        check(logits && vocab >= 1 && length >= 0 && (history || !length) && sampling,
              "sample: an argument is missing");
        if (const char* wrong = sampling_fault(*sampling, vocab)) fail(wrong);
        for (int i = 0; i < length; i++)
            check(history[i] >= 0 && history[i] < vocab, "sample: a token id is not in the vocabulary");
        std::vector<float> own(logits, logits + vocab);
        return Sampler(vocab).choose(own.data(), history, length, *sampling);
    });
}
