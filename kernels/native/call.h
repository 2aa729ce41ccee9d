/* What callers and kernels agree on: the arguments of every entry point, and how work is spread over threads.

   Every field has eight bytes, so that Python writes a call with one struct.pack (kernels/native/ops.py has the
   same order). Strides count numbers, not bytes. */
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Older compilers do not know these tiles. */
#if defined(__x86_64__) && (__GNUC__ >= 11 || (defined(__clang__) && __clang_major__ >= 12))
#define HAVE_AMX 1
#endif

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/* A map [B, H, W, C] as it lies in memory. */
typedef struct {
    char *data;
    int64_t image, row, token, channel;
} map_t;

/* One call of routed attention; `out`, of the forward pass, and `grad` have the shape of q. */
typedef struct {
    map_t q, k, v, out;
    float *lse; /* [B, heads, R * T]: log of the sum of e^logit of every query; NULL where nobody wants it */
    map_t grad, dq, dk, dv; /* backward pass only */
    const char *routes;     /* [B, heads, R, topk]; the heads' stride is 0 where they share their routes */
    int64_t route_image, route_head, route_region, route_slot, route_bytes;
    int64_t batch, heads, head_dim;
    int64_t height, width, region_h, region_w;             /* queries */
    int64_t kv_height, kv_width, kv_region_h, kv_region_w; /* keys and values */
    int64_t topk, masked, dtype, threads;
    double scale;
} attention_t;

/* LayerNorm of rows [N, C], contiguous: y = (x + shift - mean) / deviation * weight + bias. */
typedef struct {
    const char *x;
    const float *weight, *bias, *shift; /* [C] each, NULL where there is none */
    char *y;
    int64_t rows, channels, dtype, threads;
    double eps;
} norm_t;

/* Rows [N, C], contiguous, through one linear layer or two: y = second(gelu(first(norm(x)))) + add, or without a second
   one y = first(norm(x)) + add. Matrices [out, in] lie in panels of 16 outputs: of float32 as [out / 16, in, 16], of
   bfloat16 as [out / 16, in / 2, 16, 2]. */
typedef struct {
    norm_t norm; /* of x; its x, y, rows and threads are not read, and no channels stand for no norm */
    const char *x, *add;
    char *y; /* may be add, and x where a norm or a second layer reads x first */
    const void *first, *second;
    const float *first_bias, *second_bias; /* NULL where there is none */
    int64_t rows, channels, hidden, last, dtype, threads;
} linear_t;

/* Depthwise convolution of a map, stride 1, odd side, the map's size kept: out = conv(x) + bias + add. */
typedef struct {
    map_t x, add, out; /* add.data is NULL where nothing is added; it may be out */
    const float *weight, *bias; /* [side * side, C] and [C] or NULL */
    int64_t batch, height, width, channels, side, dtype, threads;
} depthwise_t;

/* Routing: region means of q and k, their products, and the topk largest of every row. */
typedef struct {
    map_t q, k;
    int64_t *routes; /* [B, R, topk], contiguous */
    int64_t batch, channels, height, width, region_h, region_w;
    int64_t kv_height, kv_width, kv_region_h, kv_region_w;
    int64_t topk, dtype, threads;
} routing_t;

/* A block of a network: position embedding, norm and projection to q, k and v, routing, attention, local enhancement of v
   or of the norm, output projection and MLP, both added to the map. Maps are [B, H, W, C], contiguous. The parts say all but where their
   maps lie: of q, k and v they say where in the bytes of a map's projection. */
typedef struct {
    depthwise_t position; /* without a weight: none */
    norm_t norm;          /* with channels: what local reads too, so the projection has none of its own */
    linear_t project;
    routing_t routing; /* topk 0: routes are given */
    attention_t attention;
    depthwise_t local; /* without a weight: none */
    linear_t merge, mlp;
    int64_t adds_input; /* the position embedding's kernel does not add the map itself */
} block_t;
enum { BLOCK_PARTS = 7 };

/* An MLP that keeps what GELU gets: `linear` with a second layer, and room for [N, hidden]. */
typedef struct {
    linear_t linear;
    float *kept;
} kept_mlp_t;

/* Back through one linear layer or an MLP, and the LayerNorm before it, in float32. Rows are contiguous, and a matrix
   [out, in] lies in panels of 16 inputs, [in / 16, out, 16]. Without `hidden` there is one layer, `first`. */
typedef struct {
    const float *grad;         /* [N, outputs]: of what the last layer gave */
    const float *last, *first; /* the second layer's matrix, and the first's */
    const float *kept;         /* [N, hidden]: what GELU got */
    const float *x;            /* [N, channels]: what the norm got; NULL where there is none */
    const float *gain, *shift; /* [channels], NULL for ones and zeros */
    const float *beside, *add; /* [N, channels] or NULL: added to the gradient of the norm's output, and to dx */
    float *activated, *dhidden; /* [N, hidden]: what GELU gave, and the gradient of what it got */
    float *y, *dx;              /* [N, channels]: what the norm gave, and the gradient of x */
    float *sums;                /* [outputs + hidden + 2 * channels]: gradients of the layers' biases, last to first, of
                                   gain and of shift; the last two only with a norm */
    int64_t rows, outputs, hidden, channels, threads;
    double eps;
} linear_grad_t;

/* Gradients of the weight and the bias of a depthwise convolution of float32 maps: [side * side, C] and, behind it,
   [C]. */
typedef struct {
    map_t x, grad; /* channels side by side */
    float *sums;   /* [side * side + 1, C] */
    int64_t batch, height, width, channels, side, threads;
} depthwise_grad_t;

/* A matrix [rows, cols] of float32 in panels of 16 rows, [rows / 16, cols, 16], or of 16 columns, [cols / 16, rows, 16].
   Both are multiples of 16. */
typedef struct {
    const float *from;
    float *to;
    int64_t rows, cols, by_columns, threads;
} panels_t;

/* What entry points return: 0, NO_MEMORY, or 1 + the place of the first route that names no region. */
enum { NO_MEMORY = -1 };

/* The kernels of one instruction set; NULL stands for those of the next slower variant. */
typedef struct {
    const char *name;
    int64_t (*forward)(const attention_t *);
    int64_t (*backward)(const attention_t *);
    int64_t (*norm)(const norm_t *);
    int64_t (*depthwise)(const depthwise_t *);
    int64_t (*route)(const routing_t *);
    int64_t (*linear)(const linear_t *);
    int64_t (*kept_mlp)(const kept_mlp_t *);
    int64_t (*linear_grad)(const linear_grad_t *);
    int64_t (*depthwise_grad)(const depthwise_grad_t *);
    int64_t (*panels)(const panels_t *);
} variant_t;

/* Calls run(context, task, scratch) for every task from 0 to tasks - 1 on up to `threads` threads of torch's own
   OpenMP. scratch is `bytes` long, aligned to 64 bytes, one per thread, and holds what the thread left in it; its first
   64 bytes are zero before its first task.
   Gives 0 or NO_MEMORY. */
typedef void (*task_t)(void *context, int64_t task, char *scratch);
int64_t spread(task_t run, void *context, int64_t tasks, size_t bytes, int64_t threads);

/* The place of the first route that is out of range, plus 1; 0 where all are in range. */
int64_t bad_route(const attention_t *call);

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
