// Runs random small models through the decoder, to be checked by sanitizers: layers of every kind, several sequences
// that are appended to, cut and cleared in any order, choices of the next token, wrong arguments, memory that runs out.
//
// The logits of a story are those of one sequence alone, read token by token on one thread. Everything else has to give
// the same bits. tests/engine/test_engine.py compares with transformers.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <deque>
#include <functional>
#include <new>
#include <numeric>
#include <string>
#include <thread>

#include "../decoder.h"
#include "random.h"

namespace {
thread_local int allocations_left = -1;  // how many succeed on this thread until one fails; below 0: all

void* allocated(size_t size, size_t alignment) {
    void* memory = nullptr;
    if (allocations_left == 0) throw std::bad_alloc();
    if (allocations_left > 0) --allocations_left;
    if (posix_memalign(&memory, alignment, size ? size : 1)) throw std::bad_alloc();
    return memory;
}
}  // namespace

void* operator new(size_t size) { return allocated(size, alignof(std::max_align_t)); }
void* operator new(size_t size, std::align_val_t alignment) { return allocated(size, static_cast<size_t>(alignment)); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }

namespace {

using Logits = std::vector<float>;

bool same(const float* a, const float* b, size_t size) { return !std::memcmp(a, b, size * sizeof(float)); }

// ---- Models

// A model of random sizes, and what it points to. If it is `broken`, token 0 is infinite and makes its sequence NaN.
struct Net {
    wf_model model{};
    bool broken = below(2);

    explicit Net(bool wide);
    ~Net() {
        for (wf_matrix* m : matrices) wf_matrix_free(m);
    }
    Net(const Net&) = delete;

    int token() const { return broken ? 1 + below(model.vocab - 1) : below(model.vocab); }

  private:
    const wf_matrix* matrix(int n, int k);
    const wf_matrix* embedding();
    const float* numbers(int size, float spread);
    wf_linear linear(int n, int k);
    void mlp(wf_linear& gate, wf_linear& up, wf_linear& down, int inner);
    void experts(wf_layer& l);
    wf_layer layer();

    std::vector<wf_matrix*> matrices;
    std::deque<std::vector<float>> kept;
    std::vector<wf_layer> layers;
    std::deque<std::vector<wf_linear>> kept_experts;
};

const wf_matrix* Net::matrix(int n, int k) {
    wf_matrix* (*const kinds[])(int, int) = {table, complex, bytes, dense};
    matrices.push_back(kinds[below(4)](n, k));
    require(matrices.back() != nullptr, "layer");
    return matrices.back();
}

const wf_matrix* Net::embedding() {
    if (!broken) return matrix(model.vocab, model.hidden);
    auto weight = normals(static_cast<size_t>(model.vocab) * model.hidden);
    std::fill_n(weight.begin(), model.hidden, FLT_MAX);  // as bf16, infinity
    matrices.push_back(wf_matrix_dense(model.vocab, model.hidden, weight.data(), nullptr, 0));
    return matrices.back();
}

const float* Net::numbers(int size, float spread) {
    kept.push_back(normals(size));
    for (float& number : kept.back()) number *= spread;
    return kept.back().data();
}

wf_linear Net::linear(int n, int k) {
    return {matrix(n, k), below(3) ? nullptr : numbers(k, 1 / std::sqrt(static_cast<float>(k))), 1e-6f, below(2)};
}

// With a gate beside it, with both in one matrix, or without a gate.
void Net::mlp(wf_linear& gate, wf_linear& up, wf_linear& down, int inner) {
    const int kind = below(3);
    gate = linear(kind == 1 ? 2 * inner : inner, model.hidden);
    if (kind == 0) up = linear(inner, model.hidden);
    down = linear(model.hidden, inner);
}

void Net::experts(wf_layer& l) {
    const wf_model& m = model;
    l.gate = l.up = l.down = wf_linear{};
    matrices.push_back(dense(m.num_experts, m.hidden));  // a matrix of complex codes has an even number of rows
    l.router.matrix = matrices.back();
    kept_experts.emplace_back(3 * m.num_experts);
    for (int e = 0; e < m.num_experts; ++e) {
        wf_linear* expert = &kept_experts.back()[3 * e];
        mlp(expert[0], expert[1], expert[2], m.expert_intermediate);
    }
    l.experts = kept_experts.back().data();
}

wf_layer Net::layer() {
    const int hidden = model.hidden, inner = model.intermediate, d = model.head_dim;
    const int q = model.heads * d, kv = model.kv_heads * d;
    const float spread =
        1 / std::sqrt(static_cast<float>(hidden));  // queries and keys are then near 1, so that no key gets all weight
    wf_layer l{};
    if (below(3))
        l.q = linear(q, hidden), l.k = linear(kv, hidden), l.v = linear(kv, hidden);
    else
        l.q = linear(q + 2 * kv, hidden);
    l.o = linear(hidden, q);
    if (model.num_experts && below(3))
        experts(l);
    else
        mlp(l.gate, l.up, l.down, inner);
    l.attention_norm = numbers(hidden, spread), l.mlp_norm = numbers(hidden, spread);
    if (below(2)) l.q_norm = numbers(d, 1);
    if (below(2)) l.k_norm = numbers(d, 1);
    if (below(3) == 0) l.post_attention_norm = numbers(hidden, 1);
    if (below(3) == 0) l.post_mlp_norm = numbers(hidden, 1);
    if (model.layer_norm && below(2))
        l.attention_shift = numbers(hidden, spread), l.mlp_shift = numbers(hidden, spread);
    l.rope = below(model.num_ropes + 1);
    l.scale = 1 / std::sqrt(static_cast<float>(d));
    l.window = pick({0, 0, 1, 5, 40});
    return l;
}

Net::Net(bool wide) {
    wf_model& m = model;
    m.head_dim = wide ? 32 : pick({2, 4, 6, 16, 18, 32, 64, 256});
    m.kv_heads = m.head_dim == 256 ? 1 : 1 + below(3);
    m.heads = m.kv_heads * (m.head_dim < 32 ? pick({1, 2, 3, 5, 32}) : pick({1, 2}));
    m.hidden = wide ? 96 : 2 * (1 + below(30));
    m.intermediate = wide ? 130 : 2 * (1 + below(40));
    m.vocab = pick({2, 6, 50, 90, 1030});
    m.num_layers = wide ? 1 : 1 + below(3);
    m.context = m.head_dim == 256 ? 20 : pick({20, 65, 130, 130});
    m.slots = 2 + below(3);
    m.max_rows = m.slots * m.context - 1;
    m.eps = 1e-5f;
    m.rope_scale[0] = pick({1, 2});
    m.rope_scale[1] = 1;
    m.embedding_scale = pick({1, 1, 3});
    m.layer_norm = below(3) == 0;
    m.num_ropes = below(3);
    m.rotary = m.num_ropes ? 2 * (1 + below(m.head_dim / 2)) : 0;
    if (below(2))
        m.num_experts = 1 + below(5), m.top_k = 1 + below(m.num_experts), m.expert_intermediate = 2 * (1 + below(20));
    m.share_of_chosen = below(2);
    m.activation = static_cast<wf_activation>(below(3));
    m.mode = below(2) ? WF_INT8 : WF_EXACT;
    m.half_cache = below(2);
    m.frequencies = numbers(m.head_dim, 0.3f);
    m.embedding = embedding();
    if (below(4) == 0) m.positions = matrix(2 * ((m.context + 1) / 2 + below(3)), m.hidden);
    m.norm = numbers(m.hidden, 1);
    if (m.layer_norm && below(2)) m.shift = numbers(m.hidden, 1);
    m.head = linear(m.vocab, m.hidden);
    for (int i = 0; i < m.num_layers; ++i) layers.push_back(layer());
    m.layers = layers.data();
}

// ---- Sequences

// A sequence: its tokens, and the logits after each.
struct Story {
    std::vector<int32_t> tokens;
    std::vector<Logits> logits;
};

wf_decoder* opened(wf_pool* pool, const wf_model& model) {
    wf_decoder* decoder = wf_decoder_new(pool, &model);
    require(decoder != nullptr, "decoder");
    return decoder;
}

Logits logits_of(wf_decoder* decoder, int vocab, int slot, const int32_t* tokens, int length) {
    Logits logits(vocab);
    const wf_append append{slot, length, tokens, nullptr, nullptr, logits.data(), 1};
    require(!wf_decoder_step(decoder, &append, 1), "step");
    return logits;
}

std::vector<Story> tell_stories(wf_pool* pool, const Net& net) {
    wf_decoder* decoder = opened(pool, net.model);
    std::vector<Story> all(net.model.slots);
    for (Story& story : all) {
        const int most = net.model.context - 1, length = &story == &all[0] ? most : 1 + below(most);
        while (static_cast<int>(story.tokens.size()) < length) story.tokens.push_back(net.token());
        for (const int32_t& token : story.tokens)
            story.logits.push_back(logits_of(decoder, net.model.vocab, 0, &token, 1));
        for (const Logits& logits : story.logits)
            for (const float logit : logits) require(std::isfinite(logit), "finite logits");
        require(!wf_decoder_truncate(decoder, 0, 0), "truncate");
    }
    wf_decoder_free(decoder);
    return all;
}

wf_sampling sampling_of(float temperature, float top_p, float penalty, int top_k, uint64_t seed, uint64_t counter) {
    wf_sampling s{};
    s.temperature = temperature, s.top_p = top_p, s.repetition_penalty = penalty;
    s.top_k = top_k, s.seed = seed, s.counter = counter;
    return s;
}

wf_sampling settings() {
    const float penalties[] = {1, 1, 0.8f, 1.3f}, temperatures[] = {0, 0.2f, 1, 3}, masses[] = {1, 1, 0.05f, 0.9f};
    const float temperature = temperatures[below(4)], mass = masses[below(4)], penalty = penalties[below(4)];
    const int top_k = pick({0, 0, 1, 3, 5000});
    const uint64_t seed = generator();
    return sampling_of(temperature, mass, penalty, top_k, seed, generator());
}

// Runs all sequences in one decoder, in steps of any kind, and compares their logits with those of their stories.
class Play {
  public:
    Play(wf_pool* pool, const Net& net, const std::vector<Story>& stories)
        : net_(net), stories_(stories), decoder_(opened(pool, net.model)), at_(stories.size()) {}
    ~Play() { wf_decoder_free(decoder_); }
    Play(const Play&) = delete;

    void run();

  private:
    struct Asked {
        std::vector<int32_t> broken;
        Logits logits;
        wf_sampling sampling;
        int32_t next = -1;
    };

    int left(int slot) const { return static_cast<int>(stories_[slot].tokens.size()) - at_[slot]; }
    bool done() const;
    void step(const std::function<int(int)>& length_of);
    void go_back(int slot);
    void compare(const wf_append& append, const Asked& asked);

    const Net& net_;
    const std::vector<Story>& stories_;
    wf_decoder* decoder_;
    std::vector<int> at_;  // tokens in each slot
    int broken_ = -1;      // the slot that gets infinite tokens
};

bool Play::done() const {
    for (size_t slot = 0; slot < stories_.size(); ++slot)
        if (static_cast<int>(slot) != broken_ && left(static_cast<int>(slot))) return false;
    return true;
}

void Play::compare(const wf_append& append, const Asked& asked) {
    at_[append.slot] += append.length;
    require(wf_decoder_length(decoder_, append.slot) == at_[append.slot], "length");
    if (append.slot == broken_) {
        require(!append.logits || std::isnan(asked.logits[0]), "NaN after an infinite token");
        return require(!append.next || (asked.next >= 0 && asked.next < net_.model.vocab), "a token of the vocabulary");
    }
    const Story& story = stories_[append.slot];
    const Logits& expected = story.logits[at_[append.slot] - 1];
    if (append.logits) require(same(asked.logits.data(), expected.data(), expected.size()), "the bits of the story");
    if (!append.next) return;
    const int* history = story.tokens.data();
    const int chosen = wf_sample(expected.data(), net_.model.vocab, history, at_[append.slot], &asked.sampling);
    require(asked.next == chosen, "the token that these logits give");
}

// Appends `length_of(slot)` tokens to each slot, and asks for logits and next tokens at random.
void Play::step(const std::function<int(int)>& length_of) {
    std::vector<wf_append> appends;
    std::deque<Asked> asked;
    for (int slot = 0; slot < net_.model.slots; ++slot) {
        const int length = length_of(slot), wanted = below(4);
        if (!length) continue;
        asked.push_back({std::vector<int32_t>(slot == broken_ ? length : 0), Logits(net_.model.vocab), settings()});
        Asked& a = asked.back();
        const int32_t* tokens = slot == broken_ ? a.broken.data() : stories_[slot].tokens.data() + at_[slot];
        appends.insert(appends.begin() + below(static_cast<int>(appends.size()) + 1),
                       {slot, length, tokens, &a.sampling, wanted & 1 ? &a.next : nullptr,
                        wanted & 2 ? a.logits.data() : nullptr, 0});
    }
    if (appends.empty()) return;
    require(!wf_decoder_step(decoder_, appends.data(), static_cast<int>(appends.size())), "step");
    for (const wf_append& append : appends)
        for (const Asked& a : asked)
            if (append.sampling == &a.sampling) compare(append, a);
}

void Play::go_back(int slot) {
    const bool all = below(3) == 0;
    at_[slot] = all ? 0 : below(at_[slot] + 1);
    require(!(all ? wf_decoder_clear(decoder_, slot) : wf_decoder_truncate(decoder_, slot, at_[slot])), "going back");
    require(wf_decoder_length(decoder_, slot) == at_[slot], "length after going back");
}

void Play::run() {
    const auto everything = [&](int slot) { return left(slot); };
    const auto something = [&](int slot) {
        if (below(3) == 0) return 0;
        if (slot == broken_) return std::min(1 + below(3), net_.model.context - at_[slot]);
        return left(slot) ? pick({1, 1 + below(left(slot))}) : 0;
    };
    step(everything);
    for (int i = 0; i < 4; ++i) go_back(below(net_.model.slots));
    if (net_.broken) go_back(broken_ = below(net_.model.slots));
    for (int turns = 5; turns || !done();) {
        step(something);
        if (turns && below(4) == 0) go_back(below(net_.model.slots)), --turns;
    }
}

// Two threads use one decoder, each with a sequence of its own.
void talk_at_once(wf_pool* pool, const Net& net, const std::vector<Story>& stories) {
    wf_decoder* decoder = opened(pool, net.model);
    const auto say = [&](int slot) {
        const Story& story = stories[slot];
        for (size_t i = 0; i < story.tokens.size(); ++i) {
            const Logits logits = logits_of(decoder, net.model.vocab, slot, &story.tokens[i], 1);
            require(same(logits.data(), story.logits[i].data(), logits.size()), "the same bits while another talks");
        }
    };
    std::thread other(say, 1);
    say(0);
    other.join();
    wf_decoder_free(decoder);
}

// Lets the first allocation of `attempt` fail, then the second, and so on, until none is left to fail and it succeeds.
template <class Attempt>
void starve(const Attempt& attempt) {
    int failures = 0;
    for (bool done = false; !done; failures += !done) {
        allocations_left = failures;
        done = attempt();
        allocations_left = -1;
        require(done || std::string(wf_error()) == "out of memory", "saying that memory ran out");
    }
    require(failures > 3, "failing where memory runs out");
}

// Without memory neither a decoder nor a step succeeds, and sequences stay as long as they were.
void run_out_of_memory(wf_pool* pool, const Net& net, const std::vector<Story>& stories) {
    wf_decoder* decoder = nullptr;
    starve([&] { return (decoder = wf_decoder_new(pool, &net.model)) != nullptr; });
    Logits logits(net.model.vocab);
    int32_t next[2];
    const wf_sampling sampling = sampling_of(1, 0.9f, 1.1f, 3, 1, 0);
    const wf_append appends[] = {{0, 1, stories[0].tokens.data(), &sampling, next, logits.data()},
                                 {1, 1, stories[1].tokens.data(), &sampling, next + 1, nullptr}};
    starve([&] {
        const bool done = !wf_decoder_step(decoder, appends, 2);
        for (const int slot : {0, 1})
            require(wf_decoder_length(decoder, slot) == done, "no tokens of a step that failed");
        return done;
    });
    require(same(logits.data(), stories[0].logits[0].data(), logits.size()), "the bits of the story after errors");
    wf_decoder_free(decoder);
}

// ---- Refusals

void refuse_models(wf_pool* pool, const Net& net) {
    const wf_model& m = net.model;
    wf_layer layer = m.layers[0];
    const auto refused = [&](const std::function<void(wf_model&)>& change) {
        wf_model changed = m;
        changed.num_layers = 1;
        changed.layers = &layer;
        change(changed);
        require(!wf_decoder_new(pool, &changed), "refusal of a model");
    };
    int wf_model::* const sizes[] = {
        &wf_model::vocab,    &wf_model::hidden,   &wf_model::intermediate, &wf_model::num_layers, &wf_model::heads,
        &wf_model::kv_heads, &wf_model::head_dim, &wf_model::context,      &wf_model::slots,      &wf_model::max_rows};
    for (const auto size : sizes)
        for (const int value : {0, -1, INT32_MIN, INT32_MAX, (1 << 26) + 1})
            refused([&](wf_model& w) { w.*size = value; });
    for (const auto size : {&wf_model::vocab, &wf_model::hidden, &wf_model::head_dim})
        refused([&](wf_model& w) { w.*size += 2; });
    if (!layer.experts) refused([&](wf_model& w) { w.intermediate += 2; });
    refused([&](wf_model& w) { w.heads = 33 * w.kv_heads; });
    refused([&](wf_model& w) { w.head_dim = 258; });
    refused([&](wf_model& w) { w.eps = NAN; });
    refused([&](wf_model& w) { w.rope_scale[0] = INFINITY; });
    refused([&](wf_model& w) { w.num_ropes = 1, w.rotary = 2, w.frequencies = nullptr; });
    refused([&](wf_model& w) { w.rotary = w.head_dim + 2; });
    refused([&](wf_model& w) { w.num_ropes = 3; });
    refused([&](wf_model& w) { w.num_experts = 2, w.top_k = 3; });
    refused([&](wf_model& w) { w.embedding = nullptr; });
    refused([&](wf_model& w) { w.norm = nullptr; });
    refused([&](wf_model& w) { w.layers = nullptr; });
    refused([&](wf_model& w) { w.head.matrix = nullptr; });
    refused([&](wf_model& w) { w.embedding = layer.gate.matrix == w.embedding ? nullptr : layer.down.matrix; });
    for (wf_linear wf_layer::* const linear : {&wf_layer::q, &wf_layer::k, &wf_layer::v, &wf_layer::o, &wf_layer::gate,
                                               &wf_layer::down, &wf_layer::router}) {
        if (!(layer.*linear).matrix) continue;  // which another holds
        (layer.*linear).matrix = nullptr;
        refused([](wf_model&) {});
        layer = m.layers[0];
    }
    layer.attention_norm = nullptr;
    refused([](wf_model&) {});
    layer = m.layers[0];
    layer.window = -1;
    refused([](wf_model&) {});
    require(!wf_decoder_new(nullptr, &m) && !wf_decoder_new(pool, nullptr), "refusal of nothing");
}

void refuse_steps(wf_pool* pool, const Net& net) {
    const wf_model& m = net.model;
    wf_decoder* decoder = opened(pool, m);
    const std::vector<int32_t> tokens(m.context + 1, 1);
    const int32_t wrong[] = {1, m.vocab}, negative[] = {-1};
    int32_t next;
    const wf_append good{0, 3, tokens.data(), nullptr, nullptr, nullptr, 0};
    require(!wf_decoder_step(decoder, &good, 1), "step");
    const auto refused = [&](const std::vector<wf_append>& appends) {
        require(wf_decoder_step(decoder, appends.data(), static_cast<int>(appends.size())) != 0, "refusal of a step");
        for (int slot = 0; slot < m.slots; ++slot)
            require(wf_decoder_length(decoder, slot) == (slot ? 0 : 3), "no change by what was refused");
    };
    refused({});
    refused(std::vector<wf_append>(m.slots + 1, good));
    refused({good, good});
    for (const int slot : {-1, m.slots, INT32_MAX, INT32_MIN})
        refused({{slot, 1, tokens.data(), nullptr, nullptr, nullptr, 0}});
    for (const int length : {0, -1, INT32_MIN, m.context - 2, INT32_MAX})
        refused({{0, length, tokens.data(), nullptr, nullptr, nullptr, 0}});
    refused({{1, 1, nullptr, nullptr, nullptr, nullptr, 0}});
    refused({good, {1, 2, wrong, nullptr, nullptr, nullptr}});
    refused({good, {1, 1, negative, nullptr, nullptr, nullptr}});
    refused({{1, 1, tokens.data(), nullptr, &next, nullptr, 0}});
    const wf_sampling odd[] = {
        sampling_of(-1, 1, 1, 0, 0, 0),  sampling_of(NAN, 1, 1, 0, 0, 0), sampling_of(INFINITY, 1, 1, 0, 0, 0),
        sampling_of(1, 0, 1, 0, 0, 0),   sampling_of(1, 2, 1, 0, 0, 0),   sampling_of(1, NAN, 1, 0, 0, 0),
        sampling_of(1, 1, 0, 0, 0, 0),   sampling_of(1, 1, -1, 0, 0, 0),  sampling_of(1, 1, INFINITY, 0, 0, 0),
        sampling_of(1, 1, NAN, 0, 0, 0), sampling_of(1, 1, 1, -1, 0, 0)};
    for (const wf_sampling& s : odd) {
        refused({{1, 1, tokens.data(), &s, &next, nullptr, 0}});
        require(wf_sample(&m.norm[0], 1, nullptr, 0, &s) == -1, "refusal of a choice");
    }
    require(wf_decoder_truncate(decoder, 0, 4) && wf_decoder_truncate(decoder, 0, -1), "refusal of a length");
    for (const int slot : {-1, m.slots})
        require(wf_decoder_length(decoder, slot) == -1 && wf_decoder_truncate(decoder, slot, 0) &&
                    wf_decoder_clear(decoder, slot),
                "refusal of a slot");
    require(wf_decoder_step(nullptr, &good, 1) && wf_decoder_step(decoder, nullptr, 1), "refusal of nothing");
    require(wf_decoder_length(nullptr, 0) == -1 && wf_decoder_bytes(nullptr) == 0, "nothing of no decoder");
    wf_decoder_free(decoder);
    wf_decoder_free(nullptr);
}

// Asks for an instruction set that does not exist. This has to come first: what was chosen once is kept.
void refuse_an_instruction_set() {
    const char* given = std::getenv("WF_ISA");
    const std::string kept = given ? given : "";
    setenv("WF_ISA", "none", 1);
    const wf_sampling s = settings();
    const float logit = 0;
    require(!wf_isa() && wf_sample(&logit, 1, nullptr, 0, &s) <= 0, "refusal of an instruction set");
    setenv("WF_ISA", kept.c_str(), 1);
}

// All logits of one step are those of single tokens, and a copy of a sequence goes on as the sequence itself.
void copy(wf_pool* pool, const Net& net, const Story& story) {
    const int vocab = net.model.vocab, length = static_cast<int>(story.tokens.size()), kept = below(length);
    wf_decoder* decoder = opened(pool, net.model);
    Logits all(static_cast<size_t>(length) * vocab);
    const wf_append append{0, length, story.tokens.data(), nullptr, nullptr, all.data(), length};
    require(!wf_decoder_step(decoder, &append, 1), "a step with all logits");
    for (int i = 0; i < length; ++i)
        require(same(&all[static_cast<size_t>(i) * vocab], story.logits[i].data(), vocab), "the bits of the story");
    for (const int target : {-1, 0, net.model.slots})
        require(wf_decoder_copy(decoder, 0, target, kept), "refusal of a slot to copy to");
    if (net.model.slots > 1) {
        require(wf_decoder_copy(decoder, 0, 1, length + 1) && wf_decoder_copy(decoder, 0, 1, -1),
                "refusal of a length");
        require(!wf_decoder_copy(decoder, 0, 1, kept) && wf_decoder_length(decoder, 1) == kept, "a copy");
        const Logits last = logits_of(decoder, vocab, 1, story.tokens.data() + kept, length - kept);
        require(same(last.data(), story.logits.back().data(), vocab), "the bits of the story in a copy");
    }
    wf_decoder_free(decoder);
}

// Caches grow by pages and give them back. A step may fill the context, and takes `max_rows` tokens at most.
void fill(wf_pool* pool, const Net& net) {
    const wf_model& m = net.model;
    wf_decoder* decoder = opened(pool, m);
    const size_t empty = wf_decoder_bytes(decoder);
    const std::vector<int32_t> tokens(m.context, 1);
    std::vector<wf_append> all;
    for (int slot = 0; slot < m.slots; ++slot)
        all.push_back({slot, m.context, tokens.data(), nullptr, nullptr, nullptr, 0});
    require(wf_decoder_step(decoder, all.data(), m.slots) != 0, "refusal of more than max_rows");
    require(wf_decoder_bytes(decoder) == empty, "no memory for what was refused");
    --all.back().length;
    require(!wf_decoder_step(decoder, all.data(), m.slots), "a step of max_rows");
    const int d = (m.head_dim + 15) / 16 * 16 + m.head_dim, element = m.half_cache ? 2 : 4;
    const size_t page = static_cast<size_t>(m.num_layers) * m.kv_heads * 64 * d * element;
    const size_t pages = (m.context + 63) / 64 * (m.slots - 1) + (m.context - 1 + 63) / 64;
    require(wf_decoder_bytes(decoder) == empty + pages * page, "as many pages as positions need");
    for (int slot = 0; slot < m.slots; ++slot) require(!wf_decoder_clear(decoder, slot), "clear");
    require(wf_decoder_bytes(decoder) == empty, "no pages left");
    wf_decoder_free(decoder);
}

// ---- Choices

struct Question {
    Logits logits;
    std::vector<int32_t> history;
    wf_sampling sampling;

    int answer() const {
        const int vocab = static_cast<int>(logits.size()), length = static_cast<int>(history.size());
        return wf_sample(logits.data(), vocab, history.data(), length, &sampling);
    }
};

Question question() {
    Question q{normals(pick({1, 2, 5, 100, 1024, 1025, 3000})), {}, settings()};
    const int vocab = static_cast<int>(q.logits.size()), spread = pick({0, 1, 30}), steps = pick({0, 1, 8});
    for (float& logit : q.logits) logit = steps ? std::rint(logit * spread * steps) / steps : logit * spread;
    for (int i = below(20); i; --i) q.history.push_back(below(vocab));
    return q;
}

Logits penalized(const Question& q) {
    Logits logits = q.logits;
    std::vector<bool> seen(logits.size());
    for (const int32_t token : q.history) {
        if (!seen[token])
            logits[token] = logits[token] < 0 ? logits[token] * q.sampling.repetition_penalty
                                              : logits[token] / q.sampling.repetition_penalty;
        seen[token] = true;
    }
    return logits;
}

// Whether wf_sampling, read plainly and worked out in float64, allows `token`. Weights that differ by rounding alone
// count as equal.
bool may_be(const Question& q, int token) {
    const Logits logits = penalized(q);
    const float largest = *std::max_element(logits.begin(), logits.end());
    const wf_sampling& s = q.sampling;
    if (s.temperature == 0) return token == std::find(logits.begin(), logits.end(), largest) - logits.begin();
    std::vector<double> weights;
    for (const float logit : logits)
        weights.push_back(std::exp((static_cast<double>(logit) - largest) / s.temperature));
    std::vector<double> sorted = weights;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    constexpr double close = 1 - 1e-5;
    if (s.top_k > 0 && s.top_k < static_cast<int>(sorted.size())) {
        const double least = sorted[s.top_k - 1] * close;
        if (weights[token] < least) return false;
        while (sorted.back() < least) sorted.pop_back();
    }
    const double mass = s.top_p * std::accumulate(sorted.begin(), sorted.end(), 0.0);
    double before = 0;
    for (const double weight : sorted)
        if (weight * close > weights[token]) before += weight;
    return s.top_p == 1 || before * close < mass;
}

// Some logits are no numbers, or masked.
void choose_among_odd_logits() {
    const float odd[] = {NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX, 1e-45f, 0};
    Question q = question();
    for (float& logit : q.logits)
        if (below(2)) logit = odd[below(7)];
    const int token = q.answer();
    require(token >= 0 && token < static_cast<int>(q.logits.size()), "a token whatever the logits are");
    Question masked = question();
    const int whole = below(static_cast<int>(masked.logits.size()));
    for (size_t i = 0; i < masked.logits.size(); ++i)
        if (below(2) && static_cast<int>(i) != whole) masked.logits[i] = -INFINITY;
    require(masked.logits[masked.answer()] > -INFINITY, "no token that is masked");
}

// The random number of this counter is 1 - 1e-9. At this end of the range, too, the token has to be one that can be
// drawn.
void choose_at_the_end() {
    constexpr uint64_t counter = 560906869;
    for (const float top_p : {1.0f, 0.9f})
        for (int round = 0; round < 20; ++round) {
            Question q = question();
            q.logits.insert(q.logits.end(), 1 + below(2000), -INFINITY);
            q.sampling = {1, top_p, 1, 0, 0, counter};
            require(q.logits[q.answer()] > -INFINITY, "no masked token at the end");
        }
}

void choose() {
    for (int round = 0; round < 400; ++round) {
        const Question q = question();
        const int token = q.answer();
        require(token >= 0 && may_be(q, token), "a token that top-k and top-p leave");
        require(token == q.answer(), "the same token for the same seed");
        choose_among_odd_logits();
    }
    choose_at_the_end();
    const wf_sampling s = settings();
    const float logit = 0;
    const int32_t wrong[] = {1, -1};
    require(wf_sample(nullptr, 1, nullptr, 0, &s) == -1 && wf_sample(&logit, 0, nullptr, 0, &s) == -1 &&
                wf_sample(&logit, 1, nullptr, 1, &s) == -1 && wf_sample(&logit, 1, wrong, 1, &s) == -1 &&
                wf_sample(&logit, 1, wrong + 1, 1, &s) == -1 && wf_sample(&logit, 1, wrong, -1, &s) == -1 &&
                wf_sample(&logit, 1, nullptr, 0, nullptr) == -1,
            "refusal of a choice");
}

}  // namespace

int main(int count, char** arguments) {
    const int rounds = count > 1 ? std::atoi(arguments[1]) : 16;
    refuse_an_instruction_set();
    wf_pool* one = wf_pool_new(1);
    wf_pool* many = wf_pool_new(3);
    require(one && many, "threads");
    choose();
    for (int round = 0; round < rounds; ++round) {
        const Net net(round % 4 == 0);
        const std::vector<Story> stories = tell_stories(one, net);
        Play(one, net, stories).run();
        Play(many, net, stories).run();
        talk_at_once(many, net, stories);
        run_out_of_memory(one, net, stories);
        refuse_models(one, net);
        refuse_steps(one, net);
        copy(many, net, stories[0]);
        fill(many, net);
    }
    wf_pool_free(one);
    wf_pool_free(many);
    std::printf("%d models on %s\n", rounds, wf_isa());
    return 0;
}
