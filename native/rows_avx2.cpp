// rows.h for AVX2.
#define WF_ROWS row_loops_avx2
#include "rows_impl.h"
