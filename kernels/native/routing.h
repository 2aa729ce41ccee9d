/* Routing in one call: means of the regions of q and k, their products, and the topk largest of every row.

   Means and products are float32 whatever the maps hold, so routes differ from PyTorch's only at near ties. */

typedef struct {
    const routing_t *call;
    int64_t regions, kv_regions, cols, kv_cols, channels; /* channels in whole vectors */
    float *q, *k;                                         /* [B, R, channels] */
} routing_job_t;

static void mean_of(float *sum, float *row, const map_t *m, int64_t b, int64_t y0, int64_t x0, int64_t rh, int64_t rw,
                    int64_t height, int64_t width, const routing_job_t *j)
{
    const routing_t *c = j->call;
    int64_t n = 0;
    for (int64_t i = 0; i < j->channels; i++)
        sum[i] = 0;
    for (int64_t y = y0; y < min_of(y0 + rh, height); y++)
        for (int64_t x = x0; x < min_of(x0 + rw, width); x++, n++) {
            const char *at = m->data + bytes_of(c->dtype) * (b * m->image + y * m->row + x * m->token);
            if (c->dtype == FLOAT32 && m->channel == 1 && c->channels == j->channels) {
                for (int64_t i = 0; i < j->channels; i += LANES)
                    store(sum + i, load(sum + i) + load((const float *)at + i));
                continue;
            }
            read_row(row, at, c->dtype, m->channel, c->channels, 1.0f);
            for (int64_t i = 0; i < c->channels; i++)
                sum[i] += row[i];
        }
    V by = splat(1.0f / (float)n);
    for (int64_t i = 0; i < j->channels; i += LANES)
        store(sum + i, load(sum + i) * by);
}

static void means_task(void *context, int64_t task, char *memory)
{
    const routing_job_t *j = context;
    const routing_t *c = j->call;
    float *row = (float *)memory;
    int64_t all = c->batch * j->regions;
    if (task < all) {
        int64_t b = task / j->regions, r = task % j->regions;
        mean_of(j->q + task * j->channels, row, &c->q, b, r / j->cols * c->region_h, r % j->cols * c->region_w,
                c->region_h, c->region_w, c->height, c->width, j);
        return;
    }
    task -= all;
    int64_t b = task / j->kv_regions, r = task % j->kv_regions;
    mean_of(j->k + task * j->channels, row, &c->k, b, r / j->kv_cols * c->kv_region_h,
            r % j->kv_cols * c->kv_region_w, c->kv_region_h, c->kv_region_w, c->kv_height, c->kv_width, j);
}

/* Whether a comes before b: NaN is the largest number, as PyTorch has it. */
INLINE int before(float a, float b) { return a > b || (a != a && b == b); }

static void choose_task(void *context, int64_t task, char *memory)
{
    const routing_job_t *j = context;
    const routing_t *c = j->call;
    float *affinity = (float *)memory;
    int64_t b = task / j->regions;
    const float *q = j->q + task * j->channels, *k = j->k + b * j->kv_regions * j->channels;
    for (int64_t r = 0; r < j->kv_regions; r++, k += j->channels) {
        V sum = {0};
        for (int64_t i = 0; i < j->channels; i += LANES)
            sum += load(q + i) * load(k + i);
        affinity[r] = sum_of(sum);
    }
    /* The best so far, best first: a new one moves the worse ones down. Ties keep the lower region first. */
    int64_t *best = c->routes + task * c->topk, found = 0;
    float *value = affinity + ceil_div(j->kv_regions, LANES) * LANES;
    for (int64_t r = 0; r < j->kv_regions; r++) {
        float x = affinity[r];
        if (found == c->topk && !before(x, value[found - 1]))
            continue;
        int64_t at = found < c->topk ? found++ : found - 1;
        for (; at > 0 && before(x, value[at - 1]); at--) {
            value[at] = value[at - 1];
            best[at] = best[at - 1];
        }
        value[at] = x;
        best[at] = r;
    }
}

static int64_t route(const routing_t *c)
{
    routing_job_t j = {.call = c};
    j.cols = ceil_div(c->width, c->region_w);
    j.kv_cols = ceil_div(c->kv_width, c->kv_region_w);
    j.regions = ceil_div(c->height, c->region_h) * j.cols;
    j.kv_regions = ceil_div(c->kv_height, c->kv_region_h) * j.kv_cols;
    j.channels = ceil_div(c->channels, LANES) * LANES;
    int64_t numbers = c->batch * (j.regions + j.kv_regions) * j.channels;
    void *means;
    if (posix_memalign(&means, 64, (size_t)numbers * 4))
        return NO_MEMORY;
    j.q = means;
    j.k = j.q + c->batch * j.regions * j.channels;
    int64_t failed = spread(means_task, &j, c->batch * (j.regions + j.kv_regions), (size_t)j.channels * 4, c->threads);
    if (!failed)
        failed = spread(choose_task, &j, c->batch * j.regions, (size_t)(j.kv_regions + LANES + c->topk) * 4, c->threads);
    free(means);
    return failed;
}
