/* A whole block in one call: what lies between its input and its output is no tensor of anybody, and the host's part of
   ten operators is that of one. */
#include "call.h"
#include <time.h>

int64_t bratune_forward(int64_t, const attention_t *);
int64_t bratune_depthwise(int64_t, const depthwise_t *);
int64_t bratune_route(int64_t, const routing_t *);
int64_t bratune_norm(int64_t, const norm_t *);
int64_t bratune_linear(int64_t, const linear_t *);

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void place(map_t *map, char *base) { map->data = base + (intptr_t)map->data; }

/* From x to out, which are other memory; what each part took in seconds is added to seconds[BLOCK_PARTS] where it is
   there. `i` is the number of the variant. */
int64_t bratune_block(int64_t i, const block_t *given, char *x, char *out, double *seconds)
{
    block_t b = *given;
    const int64_t size = b.project.dtype == FLOAT32 ? 4 : 2, rows = b.project.rows, topk = b.routing.topk;
    const int64_t projected = ceil_div(rows * b.project.last * size, 64) * 64;
    const int64_t merged = ceil_div(rows * b.merge.channels * size, 64) * 64;
    const int64_t routes = topk ? b.attention.batch * b.attention.route_image * 8 : 0;
    const int64_t normed = rows * b.norm.channels * size;
    void *memory;
    if (posix_memalign(&memory, 64, (size_t)(projected + merged + routes + normed)))
        return NO_MEMORY;
    char *qkv = memory, *attended = qkv + projected;
    b.position.x.data = x;
    b.position.out.data = out;
    if (b.adds_input)
        b.position.add = b.position.x;
    b.project.x = b.merge.add = b.position.weight ? out : x;
    b.project.y = qkv;
    place(&b.routing.q, qkv);
    place(&b.routing.k, qkv);
    if (topk) {
        b.routing.routes = (int64_t *)(attended + merged);
        b.attention.routes = attended + merged;
    }
    place(&b.attention.q, qkv);
    place(&b.attention.k, qkv);
    place(&b.attention.v, qkv);
    b.attention.out.data = attended;
    place(&b.local.x, qkv);
    if (normed) {
        b.norm.x = b.project.x;
        b.norm.y = attended + merged + routes;
        b.project.x = b.local.x.data = b.norm.y;
    }
    b.local.add.data = b.local.out.data = attended;
    b.merge.x = attended;
    b.merge.y = b.mlp.y = out;
    b.mlp.x = b.mlp.add = out;

    int64_t failed = 0;
    double last = seconds ? now() : 0;
    for (int part = 0; part < BLOCK_PARTS && !failed; part++) {
        if (part == 0 && b.position.weight)
            failed = bratune_depthwise(i, &b.position);
        else if (part == 1)
            failed = (normed ? bratune_norm(i, &b.norm) : 0) || bratune_linear(i, &b.project) ? NO_MEMORY : 0;
        else if (part == 2 && topk)
            failed = bratune_route(i, &b.routing);
        else if (part == 3)
            failed = bratune_forward(i, &b.attention);
        else if (part == 4 && b.local.weight)
            failed = bratune_depthwise(i, &b.local);
        else if (part == 5)
            failed = bratune_linear(i, &b.merge);
        else if (part == 6)
            failed = bratune_linear(i, &b.mlp);
        if (seconds) {
            double then = last;
            seconds[part] += (last = now()) - then;
        }
    }
    free(memory);
    return failed;
}
