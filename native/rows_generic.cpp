// rows.h for every processor.
#define WF_ROWS row_loops_generic
#include "rows_impl.h"
