/* The library's entry points: which instruction sets this processor has, which kernels answer, and threads. */
#include "call.h"
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern const variant_t portable_variant;
#if defined(__x86_64__)
extern const variant_t avx2_variant, avx512_variant;
#if defined(HAVE_AMX)
extern const variant_t amx_variant;
#endif
#endif

/* --- instruction sets ------------------------------------------------------------------------------- */

#if defined(__x86_64__)
/* Whether the operating system saves the registers of these bits of XCR0. */
static int saves(unsigned bits)
{
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27)))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & bits) == bits;
}

static int has_avx2(void)
{
    unsigned a, b, c, d, one_c;
    if (!__get_cpuid(1, &a, &b, &one_c, &d) || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !saves(0x6))
        return 0;
    return (one_c & (1u << 12)) && (one_c & (1u << 29)) && (b & (1u << 5)); /* FMA, F16C, AVX2 */
}

static int has_avx512(void)
{
    unsigned a, b, c, d, need = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    return has_avx2() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & need) == need && saves(0xe6);
}

#if defined(HAVE_AMX)
static int has_amx(void)
{
    unsigned a, b, c, d;
    if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 22) || !(d & 1u << 24))
        return 0; /* AMX-BF16, AMX-TILE */
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5) || !saves(0x60000)) /* AVX512-BF16 */
        return 0;
#if defined(__linux__)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0; /* ARCH_REQ_XCOMP_PERM: Linux lends tiles on request */
#else
    return 0;
#endif
}
#endif
#endif

/* The fastest first. */
static const variant_t *const known[] = {
#if defined(__x86_64__)
#if defined(HAVE_AMX)
    &amx_variant,
#endif
    &avx512_variant, &avx2_variant,
#endif
    &portable_variant,
};

static int runs_here(const variant_t *variant)
{
#if defined(__x86_64__)
#if defined(HAVE_AMX)
    if (variant == &amx_variant)
        return has_amx();
#endif
    if (variant == &avx512_variant)
        return has_avx512();
    if (variant == &avx2_variant)
        return has_avx2();
#endif
    return variant == &portable_variant;
}

/* Name of the i-th variant that was compiled, NULL after the last; *here says whether this machine runs it. */
const char *bratune_variant(int64_t i, int64_t *here)
{
    if (i < 0 || i >= (int64_t)(sizeof known / sizeof *known))
        return NULL;
    *here = runs_here(known[i]);
    return known[i]->name;
}

/* The kernels of a variant, by its number. */
#define KERNEL(i, name) (known[i]->name ? known[i]->name : known[(i) + 1]->name)

int64_t bratune_forward(int64_t i, const attention_t *call)
{
    int64_t bad = bad_route(call);
    return bad ? bad : KERNEL(i, forward)(call);
}

int64_t bratune_backward(int64_t i, const attention_t *call)
{
    int64_t bad = bad_route(call);
    return bad ? bad : KERNEL(i, backward)(call);
}

int64_t bratune_norm(int64_t i, const norm_t *call) { return KERNEL(i, norm)(call); }
int64_t bratune_depthwise(int64_t i, const depthwise_t *call) { return KERNEL(i, depthwise)(call); }
int64_t bratune_route(int64_t i, const routing_t *call) { return KERNEL(i, route)(call); }
int64_t bratune_linear(int64_t i, const linear_t *call) { return KERNEL(i, linear)(call); }
int64_t bratune_kept_mlp(int64_t i, const kept_mlp_t *call) { return KERNEL(i, kept_mlp)(call); }
int64_t bratune_linear_grad(int64_t i, const linear_grad_t *call) { return KERNEL(i, linear_grad)(call); }
int64_t bratune_depthwise_grad(int64_t i, const depthwise_grad_t *call) { return KERNEL(i, depthwise_grad)(call); }
int64_t bratune_panels(int64_t i, const panels_t *call) { return KERNEL(i, panels)(call); }

int64_t bad_route(const attention_t *c)
{
    int64_t rows = ceil_div(c->height, c->region_h) * ceil_div(c->width, c->region_w);
    int64_t regions = ceil_div(c->kv_height, c->kv_region_h) * ceil_div(c->kv_width, c->kv_region_w);
    int64_t heads = c->route_head ? c->heads : 1, place = 0;
    for (int64_t b = 0; b < c->batch; b++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t r = 0; r < rows; r++)
                for (int64_t t = 0; t < c->topk; t++, place++) {
                    const char *at = c->routes + c->route_bytes * (b * c->route_image + h * c->route_head +
                                                                   r * c->route_region + t * c->route_slot);
                    int64_t region = c->route_bytes == 4 ? *(const int32_t *)at : *(const int64_t *)at;
                    if (region < 0 || region >= regions)
                        return place + 1;
                }
    return 0;
}

/* --- memory ----------------------------------------------------------------------------------------- */

/* Asks for large pages where memory fills some: fresh memory is had page by page at its first touch, which takes as long as
   a pass over it. */
void bratune_large_pages(char *at, int64_t bytes)
{
#if defined(MADV_HUGEPAGE)
    const uintptr_t size = 2u << 20, first = ((uintptr_t)at + size - 1) / size * size;
    const uintptr_t end = ((uintptr_t)at + (uintptr_t)bytes) / size * size;
    if (end > first)
        madvise((void *)first, end - first, MADV_HUGEPAGE); /* a refusal changes nothing */
#else
    (void)at;
    (void)bytes;
#endif
}

/* --- threads ---------------------------------------------------------------------------------------- */

/* GOMP_parallel and omp_get_thread_num of the OpenMP that torch has loaded: its threads are awake already, and a second
   pool would fight with them for the cores. */
static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*thread_number)(void);

void bratune_use_openmp(void *gomp_parallel, void *omp_get_thread_num)
{
    *(void **)&parallel = gomp_parallel;
    *(void **)&thread_number = omp_get_thread_num;
}

/* The tasks of one thread that nobody has begun; in a cache line of its own. */
typedef struct {
    _Alignas(64) int64_t next;
    int64_t end;
} share_t;

typedef struct {
    task_t run;
    void *context;
    int64_t threads, failed;
    size_t bytes;
    share_t *shares; /* [threads] */
} crew_t;

/* A thread keeps its scratch: memory of this size goes back to the operating system when it is freed, and to get
   its pages again costs more than a small call. */
static __thread char *kept;
static __thread size_t kept_bytes;
static const size_t KEEP_AT_MOST = 8u << 20;
enum { NOTES = 64 }; /* bytes of the scratch that are zero when a call begins */

/* A thread begins with the share that is its own, so that in call after call it works on the same part of a map, which
   is in its cache; then it takes from the shares of others. Results do not depend on who computed what. */
static void work(void *argument)
{
    crew_t *crew = argument;
    if (kept_bytes < crew->bytes) {
        free(kept);
        kept = NULL;
        kept_bytes = 0;
        void *fresh;
        if (posix_memalign(&fresh, 64, crew->bytes)) {
            __atomic_store_n(&crew->failed, 1, __ATOMIC_RELAXED);
            return;
        }
        kept = fresh;
        kept_bytes = crew->bytes;
    }
    memset(kept, 0, NOTES);
    int64_t own = crew->threads > 1 && thread_number ? thread_number() : 0;
    for (int64_t i = 0; i < crew->threads; i++) {
        share_t *share = crew->shares + (own + i) % crew->threads;
        int64_t task;
        while ((task = __atomic_fetch_add(&share->next, 1, __ATOMIC_RELAXED)) < share->end)
            crew->run(crew->context, task, kept);
    }
    if (kept_bytes > KEEP_AT_MOST) {
        free(kept);
        kept = NULL;
        kept_bytes = 0;
    }
}

int64_t spread(task_t run, void *context, int64_t tasks, size_t bytes, int64_t threads)
{
    threads = parallel ? max_of(1, min_of(threads, tasks)) : 1;
    share_t shares[threads];
    for (int64_t i = 0; i < threads; i++)
        shares[i] = (share_t){.next = tasks * i / threads, .end = tasks * (i + 1) / threads};
    crew_t crew = {run, context, threads, 0, bytes + NOTES, shares};
    if (threads > 1)
        parallel(work, &crew, (unsigned)threads, 0);
    else
        work(&crew);
    /* A thread without memory leaves its share to the others; what nobody took is missing. */
    for (int64_t i = 0; i < threads && crew.failed; i++)
        if (shares[i].next < shares[i].end)
            return NO_MEMORY;
    return 0;
}
