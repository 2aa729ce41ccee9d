/* AVX-512 (F, DQ, BW, VL): server processors of Intel since 2017, of AMD since 2022. */
#include "call.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#endif
#define LANES 16
#include "kernels.h"

const variant_t avx512_variant = {"avx512", forward, backward, norm, depthwise, route, linear,
                                  kept_mlp, linear_grad, depthwise_grad, panels};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
