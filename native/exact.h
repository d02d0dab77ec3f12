// A row of the weight that codes stand for, in fp32: for exact products and embeddings.
#pragma once
#include "layout.h"

namespace wf {

// W[n, :], the factors `row` and `col` included: out [k].
void decode_row(const wf_matrix& m, int n, float* out);

}  // namespace wf
