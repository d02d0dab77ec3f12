// Sampling without sorting the vocabulary. The weight of token i is e^((logit_i - max) / temperature).
//
// Think of the weights in descending order. top-k keeps those that are at least the k-th largest, so also those that
// equal it. top-p then keeps each weight before which lies less than p of the sum. Both keep a beginning of the order.
// If few tokens make up the beginning, a threshold finds them, and they are sorted. Else weights are summed up in
// buckets, and only the bucket in which the beginning ends is sorted.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "vector.h"

namespace wf {
namespace {

constexpr float LIKELY = 1e-3f;   // times the largest weight: a trained model has few tokens above it
constexpr int BUCKET_SHIFT = 18;  // a bucket is a float's bits without the lower 18: 32 buckets for each power of 2
constexpr int NUM_BUCKETS = (0x3f800000 >> BUCKET_SHIFT) + 1;  // the last is that of 1, the largest weight

// Makes a random number of a counter: the finalizer of splitmix64.
uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

// In [0, 1), with 53 bits. The seed is mixed first, so that neighbouring seeds give unrelated numbers.
double uniform(uint64_t seed, uint64_t counter) {
    return static_cast<double>(mixed(mixed(seed) ^ mixed(~counter)) >> 11) * 0x1p-53;
}

// The bucket of a weight. It rises with the weight, because bits of positive floats are in their order.
int bucket(float weight) {
    uint32_t bits;
    std::memcpy(&bits, &weight, 4);
    return std::min(static_cast<int>(bits >> BUCKET_SHIFT), NUM_BUCKETS - 1);
}

}  // namespace

const char* sampling_fault(const wf_sampling& s, int vocab) {
    if (!(s.temperature >= 0) || !std::isfinite(s.temperature)) return "temperature must be 0 or more";
    if (!(s.top_p > 0 && s.top_p <= 1)) return "top_p must be above 0 and at most 1";
    if (s.top_k < 0) return "top_k must be 0 or more";
    if (!(s.repetition_penalty > 0) || !std::isfinite(s.repetition_penalty))
        return "repetition_penalty must be above 0";
    if (!(s.min_p >= 0 && s.min_p <= 1)) return "min_p must be between 0 and 1";
    if (!std::isfinite(s.presence_penalty) || !std::isfinite(s.frequency_penalty) || s.prompt < 0)
        return "presence_penalty and frequency_penalty must be numbers, and prompt 0 or more";
    if (s.num_biases < 0 || (s.num_biases && !(s.biased && s.biases))) return "biases are missing";
    for (int i = 0; i < s.num_biases; i++)
        if (s.biased[i] < 0 || s.biased[i] >= vocab || std::isnan(s.biases[i])) return "a bias is not of a token";
    return nullptr;
}

Sampler::Sampler(int vocab) : weights_(vocab), sums_(vocab / STRETCH + 1), buckets_(NUM_BUCKETS), seen_(vocab) {
    candidates_.reserve(vocab);
}

int32_t Sampler::choose(float* logits, const int32_t* history, int length, const wf_sampling& s) {
    const int vocab = static_cast<int>(weights_.size());
    adjust(logits, history, length, s);
    const int32_t best = vectors().argmax(logits, vocab);
    if (s.temperature == 0) return best;
    double mass = vectors().exp_sum(logits, logits[best], 1 / s.temperature, vocab, weights_.data(), sums_.data());
    if (!std::isfinite(mass)) return best;
    const double share = uniform(s.seed, s.counter);
    const bool some = s.top_k > 0 && s.top_k < vocab;
    if (!some && s.top_p == 1 && s.min_p == 0) return draw_any(mass * share, best);
    candidates_.clear();
    if (some) mass = keep_top_k(s.top_k);
    if (s.top_p < 1) mass = keep_top_p(s.top_p * mass);
    if (s.min_p > 0) mass = keep_min_p(s.min_p);
    return draw(mass * share);
}

void Sampler::adjust(float* logits, const int32_t* history, int length, const wf_sampling& s) {
    for (int i = 0; i < s.num_biases; i++) logits[s.biased[i]] += s.biases[i];
    if (s.repetition_penalty != 1) penalize(logits, history, length, s.repetition_penalty);
    if (s.presence_penalty != 0 || s.frequency_penalty != 0) {
        const int prompt = std::min(s.prompt, length);
        penalize_answer(logits, history + prompt, length - prompt, s);
    }
    if (!s.allowed) return;
    for (int i = 0; i < static_cast<int>(weights_.size()); i++)
        if (!(s.allowed[i / 32] >> (i % 32) & 1)) logits[i] = -INFINITY;
}

void Sampler::penalize_answer(float* logits, const int32_t* answer, int length, const wf_sampling& s) {
    std::fill(seen_.begin(), seen_.end(), uint8_t{0});
    for (int i = 0; i < length; i++) {
        const int32_t token = answer[i];
        if (!seen_[token]) logits[token] -= s.presence_penalty;
        seen_[token] = 1;
        logits[token] -= s.frequency_penalty;
    }
}

void Sampler::penalize(float* logits, const int32_t* history, int length, float penalty) {
    std::fill(seen_.begin(), seen_.end(), uint8_t{0});
    for (int i = 0; i < length; i++) {
        const int32_t token = history[i];
        if (seen_[token]) continue;
        seen_[token] = 1;
        logits[token] = logits[token] < 0 ? logits[token] * penalty : logits[token] / penalty;
    }
}

// The token at which the sum of all weights passes `left`. Rounding may let no token pass it; the answer is then
// `best`, since the last token of the vocabulary may be masked.
int32_t Sampler::draw_any(double left, int32_t best) const {
    const int vocab = static_cast<int>(weights_.size());
    int token = 0;
    for (size_t i = 0; token + STRETCH < vocab && left >= sums_[i]; i++, token += STRETCH) left -= sums_[i];
    for (; token < vocab; token++) {
        left -= weights_[token];
        if (left < 0) return token;
    }
    return best;
}

// Makes candidates of all weights of at least `threshold`, in the order of tokens. Returns their sum.
double Sampler::gather(float threshold) {
    candidates_.clear();
    double mass = 0;
    for (size_t i = 0; i < weights_.size(); i++)
        if (weights_[i] >= threshold) {
            candidates_.push_back({weights_[i], static_cast<int32_t>(i)});
            mass += weights_[i];
        }
    return mass;
}

void Sampler::sort(size_t from) {
    std::sort(candidates_.begin() + from, candidates_.end(), [](const Candidate& a, const Candidate& b) {
        return a.weight > b.weight || (a.weight == b.weight && a.token < b.token);
    });
}

// Makes candidates of the k largest weights and those that equal the k-th, in descending order. Returns their sum.
double Sampler::keep_top_k(int k) {
    for (float threshold = LIKELY;; threshold = threshold < 1e-30f ? 0 : threshold * threshold) {
        gather(threshold);
        if (candidates_.size() >= static_cast<size_t>(k)) break;
    }
    sort(0);
    const float least = candidates_[k - 1].weight;
    while (candidates_.back().weight < least) candidates_.pop_back();
    double mass = 0;
    for (const Candidate& c : candidates_) mass += c.weight;
    return mass;
}

// Keeps the beginning of the candidates' descending order that holds `mass`, and returns its sum. If there are no
// candidates yet, all weights are.
double Sampler::keep_top_p(double mass) {
    size_t kept = 0;  // candidates before this one are kept in any order; those from it on are sorted
    double before = 0;
    if (candidates_.empty() && gather(LIKELY) < mass) {
        std::fill(buckets_.begin(), buckets_.end(), 0.0);
        for (float weight : weights_) buckets_[bucket(weight)] += weight;
        int last = NUM_BUCKETS - 1;
        while (last > 0 && before + buckets_[last] < mass) before += buckets_[last--];
        gather(0);
        auto end = std::remove_if(candidates_.begin(), candidates_.end(),
                                  [last](const Candidate& c) { return bucket(c.weight) < last; });
        candidates_.erase(end, candidates_.end());
        auto middle = std::stable_partition(candidates_.begin(), candidates_.end(),
                                            [last](const Candidate& c) { return bucket(c.weight) > last; });
        kept = middle - candidates_.begin();
    }
    sort(kept);
    while (kept < candidates_.size() && (kept == 0 || before < mass)) before += candidates_[kept++].weight;
    candidates_.resize(kept);
    return before;
}

// Keeps the candidates whose weights are at least `least`, and returns their sum; the largest weight is 1. If there are
// no candidates yet, all weights are.
double Sampler::keep_min_p(float least) {
    if (candidates_.empty()) return gather(least);
    auto end = std::remove_if(candidates_.begin(), candidates_.end(),
                              [least](const Candidate& c) { return c.weight < least; });
    candidates_.erase(end, candidates_.end());
    double mass = 0;
    for (const Candidate& c : candidates_) mass += c.weight;
    return mass;
}

// The candidate at which the sum of their weights passes `left`.
int32_t Sampler::draw(double left) const {
    for (const Candidate& c : candidates_) {
        left -= c.weight;
        if (left < 0) return c.token;
    }
    return candidates_.back().token;  // only rounding leads here
}

}  // namespace wf
