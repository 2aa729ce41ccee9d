/* The forward pass of regions of one or two tokens, one query at a time. Where the keys and values of a head are read
   more than once, they are packed first: side by side they fit into a near cache, and tokens of a map do not. */

/* A row of scores becomes e^(s - max); gives their sum, and max. The factor log2(e) comes after the difference: before,
   its rounding would be one of the logits, which may be large. */
INLINE float soften(float *s, int64_t vectors, float *most)
{
    V top = load(s);
    for (int64_t c = 1; c < vectors; c++)
        top = larger(top, load(s + c * LANES));
    *most = largest_of(top);
    V sum = {0}, max = splat(*most);
    for (int64_t c = 0; c < vectors; c++) {
        V e = exp2_of((load(s + c * LANES) - max) * splat(LOG2_E));
        store(s + c * LANES, e);
        sum += e;
    }
    return sum_of(sum);
}

/* Packs all keys and values of a head. */
static void pack_head(const attention_t *c, const shape_t *s, float *keys, int64_t b, int64_t h)
{
    int64_t block = s->tk * s->dp;
    float *values = keys + s->kv_regions * block;
    for (int64_t region = 0; region < s->kv_regions; region++) {
        tile_t at = key_tile(c, s, region);
        pack_rows(keys + region * block, &c->k, c, b, h, at, s, 1.0f);
        pack_rows(values + region * block, &c->v, c, b, h, at, s, 1.0f);
    }
}

/* `find_tokens` where a head is packed. */
static void find_packed(const attention_t *c, const shape_t *s, const forward_scratch_t *f, int64_t b, int64_t h, int64_t r)
{
    const char **keys = f->m.key_tokens, **values = f->m.value_tokens;
    int64_t row = s->dp * 4, apart = s->kv_regions * s->tk * row;
    for (int64_t slot = 0; slot < c->topk; slot++) {
        int64_t region = route_of(c, b, h, r, slot);
        const char *at = (const char *)f->packed + region * s->tk * row;
        tile_t tile = c->masked ? key_tile(c, s, region) : (tile_t){0};
        for (int64_t i = 0; i < s->tk; i++, at += row) {
            int64_t hidden = c->masked && (tile.y + i / tile.w >= tile.height || tile.x + i % tile.w >= tile.width);
            *keys++ = hidden ? f->m.zero : at;
            *values++ = at + apart;
        }
    }
    for (int64_t j = s->k; j < s->kp; j++)
        *keys++ = *values++ = f->m.zero;
}

INLINE void lone_forward(const attention_t *c, const shape_t *s, const scratch_t *m, int64_t b, int64_t h, int64_t r,
                         const int dtype)
{
    tile_t at = query_tile(c, s, r);
    pack_rows(m->q, &c->q, c, b, h, at, s, s->factor);
    for (int64_t i = 0; i < s->t; i++) {
        float most;
        dot_tokens(m->s, m->q + i * s->dp, m->key_tokens, c->masked ? m->zero : NULL, s, dtype);
        float sum = soften(m->s, s->vectors, &most), by = 1.0f / sum;
        if (c->lse)
            c->lse[((b * c->heads + h) * s->regions + r) * s->t + i] = most + logf(sum);
        weigh_tokens(m->o, m->s, m->value_tokens, s, dtype);
        write_rows(m->o, &c->out, c, b, h, at, s, i, 1, &by);
    }
}

static void attend_lone(const forward_job_t *job, forward_scratch_t *f, int64_t b, int64_t h, int64_t r)
{
    const attention_t *c = job->call;
    const shape_t *s = &job->shape;
    if (job->packs)
        find_packed(c, s, f, b, h, r);
    else
        find_tokens(c, s, &f->m, b, h, r);
    if (job->packs || c->dtype == FLOAT32)
        lone_forward(c, s, &f->m, b, h, r, FLOAT32);
    else if (c->dtype == BFLOAT16)
        lone_forward(c, s, &f->m, b, h, r, BFLOAT16);
    else
        lone_forward(c, s, &f->m, b, h, r, FLOAT16);
}
