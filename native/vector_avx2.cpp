// vector.h for AVX2 with FMA.
#define WF_WIDTH 8
#define WF_NAME "avx2"
#define WF_VECTORS vectors_avx2
#include "vector_impl.h"
