/* The forward pass: which tiles serve a call, and its tasks. */

/* Image, head and query regions of a task. Where a key region serves one query region only, the heads of a stretch of
   the map follow one another: the thread that has its tokens in a cache has them for all heads. */
static void forward_range(const attention_t *c, const shape_t *s, int64_t task, int64_t *b, int64_t *h, int64_t *first,
                          int64_t *end)
{
    if (c->topk == 1) {
        int64_t part = task / c->heads % s->parts;
        task = (task / (c->heads * s->parts) * c->heads + task % c->heads) * s->parts + part;
    }
    task_range(c, s, task, b, h, first, end);
}

/* What a thread holds of a head's keys and values: what its last task left, or nothing yet. */
static blocks_t open_head(const forward_job_t *job, forward_scratch_t *f, int64_t b, int64_t h)
{
    const attention_t *c = job->call;
    const shape_t *s = &job->shape;
    int64_t head = 1 + b * c->heads + h;
    if (*f->open == head)
        return (blocks_t){c, s, b, h, 2, f->m.region_in, f->m.slots, f->m.spare, slot_floats(s, 0)};
    *f->open = head;
    memset(f->zero, 0, (size_t)s->dp * 4);
    memset(f->nowhere, 0, (size_t)s->dp * 4);
    blocks_t keys = open_blocks(c, s, &f->m, b, h, 0);
    if (job->packs)
        pack_head(c, s, f->packed, b, h);
    if (job->quads && s->kept)
        for (int64_t region = 0; region < s->kv_regions; region++) {
            if (region + 2 < s->kv_regions) {
                fetch_rows(&c->k, c, b, h, key_tile(c, s, region + 2), s);
                fetch_rows(&c->v, c, b, h, key_tile(c, s, region + 2), s);
            }
            block_of(&keys, region, region);
        }
    return keys;
}

static void forward_task(void *context, int64_t task, char *memory)
{
    const forward_job_t *job = context;
    const attention_t *c = job->call;
    const shape_t *s = &job->shape;
    pieces_t pieces = {memory, 0};
    forward_scratch_t f = lay_out_forward(&pieces, job);
    int64_t b, h, first, end;
    forward_range(c, s, task, &b, &h, &first, &end);
    blocks_t keys = open_head(job, &f, b, h);
    for (int64_t r = first; r < end; r++)
        if (s->lone)
            attend_lone(job, &f, b, h, r);
#if LANES > 4
        else if (job->quads)
            attend_quads(job, &f, &keys, r, end);
#endif
        else
            attend_region(job, &f, &keys, r, first, end);
}

static int64_t forward(const attention_t *c)
{
    int64_t block = c->head_dim + ceil_div(c->head_dim, LANES) * LANES;
    forward_job_t job = {.call = c, .shape = shape_of(c, block, 1)};
    shape_t *s = &job.shape;
    job.quads = s->once && s->d == s->dp;
    if (job.quads) {
        *s = shape_of(c, block, 0);
        s->pitch = s->tk;
    }
    s->once = 0;
    int64_t packed = 2 * s->kv_regions * s->tk * s->dp * 4;
    job.packs = s->lone && s->regions * c->topk >= 2 * s->kv_regions && packed <= KEPT_BYTES;
    job.sign = c->scale < 0 ? -1.0f : 1.0f;
    job.scale = (float)c->scale * job.sign;
    job.by = (float)(c->scale * 1.4426950408889634) * job.sign;
    job.reads_map = c->dtype == FLOAT32 && c->q.channel == 1 && c->scale > 0;
    job.writes_map = c->dtype == FLOAT32 && c->out.channel == 1 && s->d == s->dp;
    cut(s, c->batch * c->heads, c->threads, c->threads > 1 ? 4 : 1);
    pieces_t nothing = {NULL, 0};
    lay_out_forward(&nothing, &job);
    return spread(forward_task, &job, c->batch * c->heads * s->parts, (size_t)nothing.used, c->threads);
}
