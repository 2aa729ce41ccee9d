/* AVX2, FMA and F16C: processors of Intel since 2013, of AMD since 2017. */
#include "call.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LANES 8
#include "kernels.h"

const variant_t avx2_variant = {"avx2", forward, backward, norm, depthwise, route, linear,
                                  kept_mlp, linear_grad, depthwise_grad, panels};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
