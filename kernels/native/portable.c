/* Four lanes and no instruction set named: SSE2 on x86-64, NEON on Arm, whatever the compiler makes of them elsewhere.
   The readable reference of all others. */
#define LANES 4
#include "kernels.h"

const variant_t portable_variant = {"portable", forward, backward, norm, depthwise, route, linear,
                                  kept_mlp, linear_grad, depthwise_grad, panels};
