// The C interface of the native decoder: token ids to logits or to the next token, for models of the Llama family.
//
// A decoder borrows its matrices and its pool: they have to outlive it. It has `slots` sequences, each with a cache of
// keys and values that grows by pages of 64 positions up to `context`. One step takes any number of tokens of any of
// them, so that all share each product. Results are the same bits whatever else is in the step, however a
// prompt is cut into steps and whatever the number of threads. Calls on one decoder take turns. Errors as in wf.h.
//
// A token whose values overflow gives NaN, and may make NaN of earlier tokens of its sequence in the same step: clear
// the slot, truncating is not enough. Other sequences are not touched.
#pragma once
#include "wf.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct wf_decoder wf_decoder;

enum wf_activation { WF_SILU = 0, WF_RELU2 = 1 };

// A linear layer with what happens to its inputs: a norm, where `gain` [k] is not NULL, and then, in WF_EXACT, where
// `rounded` is 1, the rounding to 8 bits that the layer was trained with. WF_INT8 rounds anyway.
typedef struct wf_linear {
    const wf_matrix* matrix;
    const float* gain;
    float eps;
    int rounded;
} wf_linear;

typedef struct wf_layer {
    wf_linear q, k, v, o, gate, up, down;
    const float* attention_norm;  // [hidden]
    const float* mlp_norm;        // [hidden]
    const float* q_norm;          // [head_dim], one for all heads, or NULL
    const float* k_norm;          // [head_dim] or NULL
    int rope;                     // 0: positions are not told to this layer
    int window;                   // positions that a token sees, itself included; 0: all
} wf_layer;

typedef struct wf_model {
    int vocab, hidden, intermediate, num_layers, heads, kv_heads, head_dim;
    int context, slots, max_rows;  // max_rows: tokens that one step takes at most
    float eps;                     // of all norms but the linear layers' own
    float rope_scale;              // of sine and cosine
    enum wf_activation activation;
    enum wf_mode mode;
    int half_cache;              // 1: keys and values in bf16, half of the memory; 0: in fp32
    const float* frequencies;    // [head_dim / 2], radians per position
    const wf_matrix* embedding;  // dense [vocab, hidden]
    const float* norm;           // [hidden]
    wf_linear head;              // [vocab, hidden]
    const wf_layer* layers;      // [num_layers]
} wf_model;

// How the next token is chosen, as in transformers' `generate`: repetition penalty over all tokens of the sequence,
// temperature, top-k, top-p. temperature 0 takes the largest logit, the lowest id of several. The random number is a
// function of seed and counter alone.
typedef struct wf_sampling {
    float temperature, top_p, repetition_penalty;  // 1 switches the last two off
    int top_k;                                     // 0 switches it off
    uint64_t seed, counter;
} wf_sampling;

// `length` tokens to append to the sequence in `slot`. `next` gets the token that follows them, or is NULL; `logits`
// [vocab] of the last one (before any penalty), or NULL.
typedef struct wf_append {
    int slot, length;
    const int32_t* tokens;
    const wf_sampling* sampling;  // may be NULL where `next` is
    int32_t* next;
    float* logits;
} wf_append;

WF_API wf_decoder* wf_decoder_new(wf_pool*, const wf_model*);
WF_API void wf_decoder_free(wf_decoder*);

// Every slot at most once in a step. On an error no sequence has changed its length.
WF_API int wf_decoder_step(wf_decoder*, const wf_append* appends, int count);

WF_API int wf_decoder_length(wf_decoder*, int slot);                // tokens in it, or -1
WF_API int wf_decoder_truncate(wf_decoder*, int slot, int length);  // keep the first `length`; pages stay with the slot
WF_API int wf_decoder_clear(wf_decoder*, int slot);                 // give its pages back
WF_API size_t wf_decoder_bytes(wf_decoder*);                        // of caches and buffers

// One choice from logits [vocab] by themselves; `history` are the tokens that the penalty applies to. -1 on an error.
WF_API int32_t wf_sample(const float* logits, int vocab, const int32_t* history, int length, const wf_sampling*);

#ifdef __cplusplus
}
#endif
