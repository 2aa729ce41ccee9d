/* All kernels of one variant; the file that includes this has said which: LANES, and the compiler's target. */
#include "simd.h"

/* Tokens and vectors of channels of a depthwise strip: sums in registers enough to hide the latency of a fused
   operation on two ports, and a register left for each weight. */
#define DW_TOKENS 8
#if LANES == 16 || defined(__aarch64__)
#define DW_VECTORS 2
#else
#define DW_VECTORS 1
#endif

#include "attention.h"
#include "tiles.h"
#include "quads.h"
#include "few.h"
#include "forward.h"
#include "depthwise.h"
#include "norm.h"
#include "linear.h"
#include "routing.h"
#include "gradients.h"
