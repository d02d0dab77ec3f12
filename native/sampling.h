// The next token from logits: see wf_sampling in decoder.h.
#pragma once
#include <vector>

#include "decoder.h"

namespace wf {

// What is wrong with these settings, or nullptr.
const char* sampling_fault(const wf_sampling&);

// Choices from one vocabulary. All memory is taken at the beginning, so that no choice fails, and no step of the decoder
// once a sequence has got its tokens.
class Sampler {
  public:
    explicit Sampler(int vocab);

    // logits [vocab] are changed where there is a penalty. Tokens of `history` lie in [0, vocab).
    int32_t choose(float* logits, const int32_t* history, int length, const wf_sampling&);

  private:
    struct Candidate {
        float weight;
        int32_t token;
    };

    void penalize(float* logits, const int32_t* history, int length, float penalty);
    int32_t draw_any(double left, int32_t best) const;
    double keep_top_k(int k);
    double keep_top_p(double mass);
    double gather(float threshold);
    void sort(size_t from);
    int32_t draw(double left) const;

    std::vector<float> weights_, sums_;
    std::vector<Candidate> candidates_;  // what is left to choose from
    std::vector<double> buckets_;
    std::vector<uint8_t> seen_;
};

}  // namespace wf
