/* All kernels of one variant; the file that includes this has said which: LANES, and the compiler's target. */
#include "simd.h"

/* Rows of a task of LayerNorm: 16 of 64 channels are 4 KiB, enough to be worth a turn. */
#define NORM_ROWS 16
/* Tokens of a depthwise strip: as many sums in registers as hide the latency of a fused operation on two ports. */
#define DW_TOKENS 8
#define DW_REST 3

#include "attention.h"
#include "depthwise.h"
#include "norm.h"
#include "routing.h"
