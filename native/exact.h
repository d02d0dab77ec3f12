// Rows of the weight that codes stand for, in fp32, for exact products and embeddings.
#pragma once
#include "layout.h"

namespace wf {

// Row n of the weight, with the factors `row` and `col` in it: out [k].
void decode_row(const wf_matrix& m, int n, float* out);

}  // namespace wf
