// vector.h for any processor.
#define WF_WIDTH 4
#define WF_NAME "generic"
#define WF_VECTORS vectors_generic
#include "vector_impl.h"
