// A row of the weight that codes stand for, in fp32: for exact products and embeddings.
#pragma once
#include "layout.h"

namespace wf {

// V[n, :], without the factors `row` and `col`: out [k].
void decode_row(const wf_matrix& m, int n, float* out);

}  // namespace wf
