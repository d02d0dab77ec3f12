// The C interface of the native decoder: from token ids to logits or to the next token, for models of the Llama family
// and its neighbours: Gemma 3, Phi-3, GPT-2, experts.
//
// A decoder borrows its matrices and its pool, which have to outlive it. It has `slots` sequences. Each has a cache of
// keys and values that grows by pages of 64 positions, up to `context`. A step appends tokens to any number of
// sequences, which all share each product. Results have the same bits whatever else is in the step, however a prompt is
// cut into steps, and whatever the number of threads. Calls on one decoder wait for each other. Errors are reported as
// in wf.h.
//
// A token whose values overflow gives NaN. It may make NaN of earlier tokens of its sequence in the same step, so clear
// the slot: to truncate it is not enough. Other sequences are not affected.
#pragma once
#include "wf.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct wf_decoder wf_decoder;

enum wf_activation { WF_SILU = 0, WF_RELU2 = 1, WF_GELU_TANH = 2 };

// A linear layer, and what happens to its inputs. They are normed if `gain` [k] is not NULL. If `rotated` is 1, they
// then get signs, and a Hadamard transform of each block (core/rotation.py). In WF_EXACT they are then rounded to 8 bits
// if `rounded` is 1, because the layer was trained with it; WF_INT8 rounds all inputs.
typedef struct wf_linear {
    const wf_matrix* matrix;
    const float* gain;
    float eps;
    int rounded;
    int rotated;
} wf_linear;

// Layers may be one matrix: if `k` and `v` have none, the rows of `q` are queries, keys and values; if `up` has none, the
// rows of `gate` are gate and up, or, if they are as many as `intermediate`, gate alone: down(act(gate x)).
//
// With `experts`, the MLP is a sum over the `top_k` experts with the largest probability, each times its probability,
// and `gate`, `up` and `down` have no matrix.
typedef struct wf_layer {
    wf_linear q, k, v, o, gate, up, down;
    wf_linear router;                  // [num_experts, hidden]
    const wf_linear* experts;          // [num_experts][3]: gate, up and down of each; NULL if there are none
    const float* attention_norm;       // [hidden]
    const float* mlp_norm;             // [hidden]
    const float* attention_shift;      // [hidden], added by a LayerNorm, or NULL
    const float* mlp_shift;            // [hidden] or NULL
    const float* post_attention_norm;  // [hidden], of what attention gives, or NULL
    const float* post_mlp_norm;        // [hidden], of what the MLP gives, or NULL
    const float* q_norm;               // [head_dim], the same for all heads, or NULL
    const float* k_norm;               // [head_dim] or NULL
    int rope;                          // number of its frequencies, from 1; 0: positions do not rotate queries and keys
    int window;                        // how many positions a token sees, its own included; 0: all
    float scale;                       // of the products of queries and keys
} wf_layer;

typedef struct wf_model {
    int vocab, hidden, intermediate, num_layers, heads, kv_heads, head_dim;
    int rotary;                                   // how many numbers of a head are rotated, the first ones
    int num_experts, top_k, expert_intermediate;  // 0 if no layer has experts
    int context, slots, max_rows;                 // max_rows: the most tokens that one step takes
    int layer_norm;                               // 1: `*_norm` of [hidden] are LayerNorms, which take the mean off
    int share_of_chosen;                          // 1: the probabilities of the experts chosen are made to add up to 1
    int num_ropes;                                // 0 to 2
    float eps;                                    // of all norms except those of wf_linear
    float rope_scale[2];                          // factors of sine and cosine
    float embedding_scale;                        // factor of the rows of the embedding
    enum wf_activation activation;
    enum wf_mode mode;
    int half_cache;              // 1: keys and values in bf16, half of the memory; 0: in fp32
    const float* frequencies;    // [num_ropes, rotary / 2], radians per position
    const wf_matrix* embedding;  // dense [vocab, hidden]
    const wf_matrix* positions;  // [context or more, hidden], added to the embedding, or NULL
    const float* norm;           // [hidden]
    const float* shift;          // [hidden] or NULL
    wf_linear head;              // [vocab, hidden]
    const wf_layer* layers;      // [num_layers]
} wf_model;

// How the next token is chosen. The order is that of transformers' `generate`: repetition penalty over all tokens of
// the sequence, temperature, top-k, top-p, min-p. Biases come before it; presence and frequency penalty, and what is
// allowed, right after the repetition penalty. With temperature 0 the largest logit wins, and the lowest id if there
// are several. The random number is a function of seed and counter alone.
typedef struct wf_sampling {
    float temperature, top_p, repetition_penalty;  // 1 switches top_p and the penalty off
    int top_k;                                     // 0 switches it off
    uint64_t seed, counter;
    // 0 and NULL switch each of the following off.
    float min_p;  // tokens with less than this share of the largest probability are left out
    // Of each token after the first `prompt` of the sequence: `presence_penalty` is taken off its logit once, and
    // `frequency_penalty` as often as it stands there.
    float presence_penalty, frequency_penalty;
    int prompt;
    int num_biases;  // biases[i] is added to the logit of biased[i]
    const int32_t* biased;
    const float* biases;
    const uint32_t* allowed;  // a bit for each token, the lowest first; others are not chosen
} wf_sampling;

// `length` tokens to append to the sequence in `slot`. If `next` is not NULL, it gets the token that is chosen to
// follow them. If `logits` [num_logits, vocab] is not NULL, it gets the logits of the last tokens, before any penalty;
// `num_logits` of 0 means 1.
typedef struct wf_append {
    int slot, length;
    const int32_t* tokens;
    const wf_sampling* sampling;  // may be NULL if `next` is
    int32_t* next;
    float* logits;
    int num_logits;
} wf_append;

WF_API wf_decoder* wf_decoder_new(wf_pool*, const wf_model*);
WF_API void wf_decoder_free(wf_decoder*);

// A slot may stand in a step once. On an error no sequence has changed its length.
WF_API int wf_decoder_step(wf_decoder*, const wf_append* appends, int count);

WF_API int wf_decoder_length(wf_decoder*, int slot);                // how many tokens it has, or -1 on an error
WF_API int wf_decoder_truncate(wf_decoder*, int slot, int length);  // keeps the first `length` tokens, and all pages
WF_API int wf_decoder_clear(wf_decoder*, int slot);                 // gives its pages back
// Replaces the sequence in `to` by the first `length` tokens of another, as if they had been appended there.
WF_API int wf_decoder_copy(wf_decoder*, int from, int to, int length);
WF_API size_t wf_decoder_bytes(wf_decoder*);  // of caches and buffers

// Chooses a token from logits [vocab] without a decoder. `history` are the tokens that the penalty applies to. Returns
// -1 on an error.
WF_API int32_t wf_sample(const float* logits, int vocab, const int32_t* history, int length, const wf_sampling*);

#ifdef __cplusplus
}
#endif
