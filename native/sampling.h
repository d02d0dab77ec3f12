// Chooses the next token from logits, as wf_sampling in decoder.h says.
#pragma once
#include <vector>

#include "decoder.h"

namespace wf {

// What is wrong with these settings, or nullptr.
const char* sampling_fault(const wf_sampling&, int vocab);

// Makes choices from one vocabulary. It takes all its memory at the beginning, so that no choice can fail: the decoder
// chooses after it has lengthened the sequences.
class Sampler {
  public:
    explicit Sampler(int vocab);

    // Changes logits [vocab] if there is a penalty, a bias or a limit to what is allowed. Tokens of `history` are in [0, vocab).
    int32_t choose(float* logits, const int32_t* history, int length, const wf_sampling&);

  private:
    struct Candidate {
        float weight;
        int32_t token;
    };

    void adjust(float* logits, const int32_t* history, int length, const wf_sampling&);
    void penalize(float* logits, const int32_t* history, int length, float penalty);
    void penalize_answer(float* logits, const int32_t* answer, int length, const wf_sampling&);
    int32_t draw_any(double left, int32_t best) const;
    double keep_top_k(int k);
    double keep_top_p(double mass);
    double keep_min_p(float least);
    double gather(float threshold);
    void sort(size_t from);
    int32_t draw(double left) const;

    std::vector<float> weights_, sums_;
    std::vector<Candidate> candidates_;  // the tokens that are left to choose from
    std::vector<double> buckets_;
    std::vector<uint8_t> seen_;
};

}  // namespace wf
