// What each instruction set provides: kernels.inc, compiled with its registers.
#pragma once
#include "layout.h"

namespace wf {

// One stream of a matrix times activations. The first stream sets y [tokens, n], later ones add to it.
struct Job {
    const wf_matrix& matrix;
    int stream;
    const Activations& activations;
    const float* scales;  // one for each token of the activations
    float* y;
};

struct Kernels {
    const char* name;

    // Panels [begin, end) of a job.
    void (*product)(const Job&, int begin, int end);

    // Writes the tables and sums of a rounded token [2, k / 2]. If it is given, complex codes lie as planes.
    void (*tables)(const int8_t* q, const Activations& to, int token);

    // q = rint(x * (1 / max|x| * 127)). Returns the scale, max|x| / 127, or NaN if x is not finite.
    float (*quantize)(const float* x, int size, int8_t* q);

    // Adds the sums of bytes 0-3, 4-7, 8-11 and 12-15 of every 16 to lanes[4].
    void (*sum)(const int8_t* q, int size, int32_t* lanes);

    // Both in 16 partial sums, so that every instruction set gives the same bits.
    float (*dot)(const float* a, const float* b, int size);
    float (*dot_bf16)(const uint16_t* a, const float* b, int size);
};

// The best ones for this processor, or those that the environment variable WF_ISA names. Throws Error if the processor
// does not have those.
const Kernels& kernels();

extern const Kernels generic_kernels;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels avx2_kernels, avxvnni_kernels, avx512_kernels;
#elif defined(__aarch64__) || defined(_M_ARM64)
extern const Kernels neon_kernels;
#endif

}  // namespace wf
