/* Routing in one call: means of the regions of q and k, their products, and the topk largest of every row.

   Means and products are float32 whatever the maps hold, so routes differ from PyTorch's only at near ties. */

/* Query regions whose affinities are computed at once, each with four key regions: that many sums fit into the registers. */
#if LANES == 16 || defined(__aarch64__)
#define ROUTED 4
#else
#define ROUTED 2
#endif

typedef struct {
    const routing_t *call;
    int64_t regions, kv_regions, cols, kv_cols, channels; /* channels in whole vectors */
    int64_t groups;                                       /* of ROUTED query regions, in an image */
    float *q, *k;                                         /* [B, R, channels] */
} routing_job_t;

/* A region of a map: its first token, and how many tokens are on the map. */
typedef struct {
    const map_t *map;
    const char *first;
    int64_t h, w;
} patch_t;

static patch_t patch_of(const routing_t *c, const map_t *m, int64_t b, int64_t y, int64_t x, int64_t rh, int64_t rw,
                        int64_t height, int64_t width)
{
    const char *first = m->data + bytes_of(c->dtype) * (b * m->image + y * m->row + x * m->token);
    return (patch_t){m, first, min_of(rh, height - y), min_of(rw, width - x)};
}

/* nv vectors of channels of a region's mean; channels lie side by side. */
INLINE void mean_vectors(float *to, const patch_t *p, int64_t first, const int dtype, const int nv)
{
    const int size = dtype == FLOAT32 ? 4 : 2;
    V sum[4];
    UNROLL for (int v = 0; v < nv; v++) sum[v] = (V){0};
    for (int64_t y = 0; y < p->h; y++) {
        const char *at = p->first + size * (y * p->map->row + first);
        for (int64_t x = 0; x < p->w; x++, at += size * p->map->token)
            UNROLL for (int v = 0; v < nv; v++) sum[v] += read_vector(at + v * LANES * size, dtype);
    }
    V by = splat(1.0f / (float)(p->h * p->w));
    UNROLL for (int v = 0; v < nv; v++) store(to + first + v * LANES, sum[v] * by);
}

INLINE void mean_as(float *to, const patch_t *p, int64_t channels, const int dtype)
{
    int64_t e = 0;
    for (; e + 4 * LANES <= channels; e += 4 * LANES)
        mean_vectors(to, p, e, dtype, 4);
    for (; e < channels; e += LANES)
        mean_vectors(to, p, e, dtype, 1);
}

static void mean_of(float *to, float *row, const patch_t *p, const routing_job_t *j)
{
    const routing_t *c = j->call;
    if (p->map->channel == 1 && c->channels == j->channels) {
        if (c->dtype == FLOAT32)
            mean_as(to, p, c->channels, FLOAT32);
        else if (c->dtype == BFLOAT16)
            mean_as(to, p, c->channels, BFLOAT16);
        else
            mean_as(to, p, c->channels, FLOAT16);
        return;
    }
    for (int64_t i = 0; i < j->channels; i++)
        to[i] = 0;
    for (int64_t y = 0; y < p->h; y++)
        for (int64_t x = 0; x < p->w; x++) {
            const char *at = p->first + bytes_of(c->dtype) * (y * p->map->row + x * p->map->token);
            read_row(row, at, c->dtype, p->map->channel, c->channels, 1.0f);
            for (int64_t i = 0; i < c->channels; i++)
                to[i] += row[i];
        }
    float by = 1.0f / (float)(p->h * p->w);
    for (int64_t i = 0; i < c->channels; i++)
        to[i] *= by;
}

/* The means of query region r and of key region r of an image, where there are such. */
static void means_task(void *context, int64_t task, char *memory)
{
    const routing_job_t *j = context;
    const routing_t *c = j->call;
    int64_t most = max_of(j->regions, j->kv_regions), b = task / most, r = task % most;
    if (r < j->regions) {
        patch_t p = patch_of(c, &c->q, b, r / j->cols * c->region_h, r % j->cols * c->region_w, c->region_h, c->region_w,
                             c->height, c->width);
        mean_of(j->q + (b * j->regions + r) * j->channels, (float *)memory, &p, j);
    }
    if (r < j->kv_regions) {
        patch_t p = patch_of(c, &c->k, b, r / j->kv_cols * c->kv_region_h, r % j->kv_cols * c->kv_region_w,
                             c->kv_region_h, c->kv_region_w, c->kv_height, c->kv_width);
        mean_of(j->k + (b * j->kv_regions + r) * j->channels, (float *)memory, &p, j);
    }
}

/* Whether a comes before b: NaN is the largest number, as PyTorch has it. */
INLINE int before(float a, float b) { return a > b || (a != a && b == b); }

/* The topk largest of a row, best first, `value` holding the best so far: a new one moves the worse ones down. Ties keep
   the lower region first. */
static void choose(int64_t *best, float *value, const float *affinity, int64_t regions, int64_t topk)
{
    int64_t found = 0;
    for (int64_t r = 0; r < regions; r++) {
        float x = affinity[r];
        if (found == topk && !before(x, value[found - 1]))
            continue;
        int64_t at = found < topk ? found++ : found - 1;
        for (; at > 0 && before(x, value[at - 1]); at--) {
            value[at] = value[at - 1];
            best[at] = best[at - 1];
        }
        value[at] = x;
        best[at] = r;
    }
}

/* Affinities [ROUTED, row] of query regions q to key regions r to r + 3; a region that is not there is the last one. */
INLINE void affinities(float *to, int64_t row, const float *const *q, const float *k, const routing_job_t *j, int64_t r)
{
    V sum[ROUTED][4];
    const float *at[4];
    UNROLL for (int u = 0; u < 4; u++)
    {
        at[u] = k + min_of(r + u, j->kv_regions - 1) * j->channels;
        UNROLL for (int i = 0; i < ROUTED; i++) sum[i][u] = (V){0};
    }
    for (int64_t e = 0; e < j->channels; e += LANES) {
        V key[4];
        UNROLL for (int u = 0; u < 4; u++) key[u] = load(at[u] + e);
        UNROLL for (int i = 0; i < ROUTED; i++)
        {
            V query = load(q[i] + e);
            UNROLL for (int u = 0; u < 4; u++) sum[i][u] += query * key[u];
        }
    }
    UNROLL for (int i = 0; i < ROUTED; i++)
    {
        V four = across_four(sum[i], 0);
        memcpy(to + i * row + r, &four, 16);
    }
}

static void choose_task(void *context, int64_t task, char *memory)
{
    const routing_job_t *j = context;
    const routing_t *c = j->call;
    int64_t b = task / j->groups, first = task % j->groups * ROUTED, row = ceil_div(j->kv_regions, LANES) * LANES;
    float *affinity = (float *)memory;
    const float *q[ROUTED], *k = j->k + b * j->kv_regions * j->channels;
    for (int i = 0; i < ROUTED; i++)
        q[i] = j->q + (b * j->regions + min_of(first + i, j->regions - 1)) * j->channels;
    for (int64_t r = 0; r < j->kv_regions; r += 4)
        affinities(affinity, row, q, k, j, r);
    for (int64_t i = 0; i < min_of(ROUTED, j->regions - first); i++)
        choose(c->routes + (b * j->regions + first + i) * c->topk, affinity + ROUTED * row, affinity + i * row,
               j->kv_regions, c->topk);
}

static int64_t route(const routing_t *c)
{
    routing_job_t j = {.call = c};
    j.cols = ceil_div(c->width, c->region_w);
    j.kv_cols = ceil_div(c->kv_width, c->kv_region_w);
    j.regions = ceil_div(c->height, c->region_h) * j.cols;
    j.kv_regions = ceil_div(c->kv_height, c->kv_region_h) * j.kv_cols;
    j.channels = ceil_div(c->channels, LANES) * LANES;
    j.groups = ceil_div(j.regions, ROUTED);
    int64_t numbers = c->batch * (j.regions + j.kv_regions) * j.channels;
    void *means;
    if (posix_memalign(&means, 64, (size_t)numbers * 4))
        return NO_MEMORY;
    j.q = means;
    j.k = j.q + c->batch * j.regions * j.channels;
    int64_t row = ceil_div(j.kv_regions, LANES) * LANES;
    int64_t failed = spread(means_task, &j, c->batch * max_of(j.regions, j.kv_regions), (size_t)j.channels * 4, c->threads);
    if (!failed)
        failed = spread(choose_task, &j, c->batch * j.groups, (size_t)(ROUTED * row + c->topk) * 4, c->threads);
    free(means);
    return failed;
}
