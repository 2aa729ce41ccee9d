/* All kernels of one variant; the file that includes this has said which: LANES, and the compiler's target. */
#include "simd.h"

/* Rows of a task of LayerNorm: 16 of 64 channels are 4 KiB, enough to be worth a turn. */
#define NORM_ROWS 16
/* Tokens and vectors of channels of a depthwise strip: sums in registers enough to hide the latency of a fused
   operation on two ports, and a register left for each weight. */
#define DW_TOKENS 8
#if LANES == 16 || defined(__aarch64__)
#define DW_VECTORS 2
#else
#define DW_VECTORS 1
#endif

#include "attention.h"
#include "depthwise.h"
#include "norm.h"
#include "routing.h"
