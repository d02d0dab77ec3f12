// vector.h for AVX-512.
#define WF_WIDTH 16
#define WF_NAME "avx512"
#define WF_VECTORS vectors_avx512
#include "vector_impl.h"
