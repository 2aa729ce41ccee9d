/* The forward pass of regions of 2x2 tokens, in which a tile of queries by whole vectors of keys would have to be put
   together from four blocks for every channel. Here a vector is up to four queries by the four keys of a region: a quad. A
   block [D, 4] of keys is one load per channel for all four queries, which wait as [D, 4] and are spread where they are read. */

#if LANES > 4
/* Vectors of a quad, four queries by four keys, and quads of a register tile. */
#define QUAD_VECTORS (16 / LANES)
#define TILE_QUADS (LANES / 2)

/* The channels of the four queries of vector v of a quad, each four times, out of those of all four queries. */
INLINE V widened(const float *thin, const int v)
{
#if LANES == 16
    return _mm512_permutevar_ps(load_four(thin), _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
#else
    const __m256i low = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), high = _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3);
    return _mm256_permutevar_ps(load_four(thin), v ? high : low);
#endif
}

/* Scores w [n, 4 queries, 4 keys] of the keys of n blocks, from queries [D, 4]. */
INLINE void quad_tile(float *w, const float *thin, float *const *blocks, int64_t d, const float *bias, const int n)
{
    V sum[TILE_QUADS][QUAD_VECTORS];
    const float *at[TILE_QUADS];
    UNROLL for (int j = 0; j < n; j++)
    {
        at[j] = blocks[j];
        UNROLL for (int v = 0; v < QUAD_VECTORS; v++) sum[j][v] = (V){0};
    }
    for (int64_t e = 0; e < 4 * d; e += 4) {
        V query[QUAD_VECTORS];
        UNROLL for (int v = 0; v < QUAD_VECTORS; v++) query[v] = widened(thin + e, v);
        UNROLL for (int j = 0; j < n; j++)
        {
            V key = load_four(at[j] + e);
            UNROLL for (int v = 0; v < QUAD_VECTORS; v++) sum[j][v] += key * query[v];
        }
    }
    UNROLL for (int j = 0; j < n; j++)
        UNROLL for (int v = 0; v < QUAD_VECTORS; v++)
            store(w + 16 * j + v * LANES, bias ? sum[j][v] + load_four(bias + 4 * j) : sum[j][v]);
}

/* Scores become weights. */
INLINE void soften_quads(const forward_job_t *job, float *w, int64_t quads, float *factors, float *lse)
{
    V top[QUAD_VECTORS], sum[QUAD_VECTORS], by = splat(job->by);
    UNROLL for (int v = 0; v < QUAD_VECTORS; v++)
    {
        top[v] = load(w + v * LANES);
        sum[v] = (V){0};
    }
    for (int64_t j = 1; j < quads; j++)
        UNROLL for (int v = 0; v < QUAD_VECTORS; v++) top[v] = larger(top[v], load(w + 16 * j + v * LANES));
    UNROLL for (int v = 0; v < QUAD_VECTORS; v++) top[v] = of_fours(top[v], 1);
    for (int64_t j = 0; j < quads; j++)
        UNROLL for (int v = 0; v < QUAD_VECTORS; v++)
        {
            float *at = w + 16 * j + v * LANES;
            V e = exp2_of((load(at) - top[v]) * by);
            store(at, e);
            sum[v] += e;
        }
    float tops[16], sums[16];
    UNROLL for (int v = 0; v < QUAD_VECTORS; v++)
    {
        store(tops + v * LANES, top[v]);
        store(sums + v * LANES, of_fours(sum[v], 0));
    }
    for (int i = 0; i < NQ; i++)
        factors[i] = 1.0f / sums[4 * i];
    if (lse)
        for (int64_t i = 0; i < job->shape.t; i++)
            lse[i] = tops[4 * i] * job->scale + logf(sums[4 * i]);
}

/* Outputs of four queries; keys take turns in `ways` sums, which alone would wait for themselves. */
INLINE void quad_outputs(float *const *o, int64_t first, const float *w, float *const *blocks, int64_t quads, int64_t d,
                         const float *factors, const int nv, const int ways)
{
    V sum[4][NQ][NV];
    UNROLL for (int a = 0; a < ways; a++)
        UNROLL for (int i = 0; i < NQ; i++)
            UNROLL for (int v = 0; v < nv; v++) sum[a][i][v] = (V){0};
    for (int64_t s = 0; s < quads; s++, w += 16) {
        const float *rows = blocks[s] + 4 * d + first;
        UNROLL for (int j = 0; j < 4; j++)
        {
            V value[NV];
            UNROLL for (int v = 0; v < nv; v++) value[v] = load(rows + j * d + v * LANES);
            UNROLL for (int i = 0; i < NQ; i++)
            {
                V weight = splat(w[4 * i + j]);
                UNROLL for (int v = 0; v < nv; v++) sum[j % ways][i][v] += weight * value[v];
            }
        }
    }
    UNROLL for (int i = 0; i < NQ; i++)
        UNROLL for (int v = 0; v < nv; v++)
        {
            V all = sum[0][i][v];
            UNROLL for (int a = 1; a < ways; a++) all += sum[a][i][v];
            store(o[i] + first + v * LANES, all * splat(factors[i]));
        }
}

static void attend_quads(const forward_job_t *job, forward_scratch_t *f, blocks_t *keys, int64_t r, int64_t end)
{
    const attention_t *c = job->call;
    const shape_t *s = &job->shape;
    scratch_t *m = &f->m;
    int64_t b = keys->b, h = keys->h, topk = c->topk;
    for (int64_t slot = 0; slot < topk; slot++) {
        m->regions[slot] = route_of(c, b, h, r, slot);
        m->blocks[slot] = s->kept ? keys->slots + m->regions[slot] * keys->slot_floats
                                  : block_of(keys, m->regions[slot], slot);
    }
    const float *bias = c->masked ? m->bias : NULL;
    if (bias)
        bias_of(c, s, m->regions, m->bias);
    tile_t at = query_tile(c, s, r);
    find_rows(job, f, b, h, at);
    if (r + 1 < end)
        fetch_rows(&c->q, c, b, h, query_tile(c, s, r + 1), s);
    transpose(f->thin, 4, f->queries, 4, s->d);
    for (int64_t slot = 0, n; slot < topk; slot += n) {
        float *to = m->s + 16 * slot;
        const float *of_keys = bias ? bias + 4 * slot : NULL;
        n = topk - slot >= TILE_QUADS ? TILE_QUADS : topk - slot >= TILE_QUADS / 2 ? TILE_QUADS / 2 : 1;
        if (n == TILE_QUADS)
            quad_tile(to, f->thin, m->blocks + slot, s->d, of_keys, TILE_QUADS);
        else if (n > 1)
            quad_tile(to, f->thin, m->blocks + slot, s->d, of_keys, TILE_QUADS / 2);
        else
            quad_tile(to, f->thin, m->blocks + slot, s->d, of_keys, 1);
    }
    float factors[NQ];
    soften_quads(job, m->s, topk, factors, c->lse ? c->lse + ((b * c->heads + h) * s->regions + r) * s->t : NULL);
    for (int64_t v = 0, nv; v < s->d; v += nv * LANES) {
        nv = min_of((s->d - v) / LANES, NV);
        if (nv == 1)
            quad_outputs(f->outs, v, m->s, m->blocks, topk, s->d, factors, 1, LANES == 16 ? 4 : 2);
        else if (nv == 2)
            quad_outputs(f->outs, v, m->s, m->blocks, topk, s->d, factors, 2, LANES == 16 ? 2 : 1);
#if NV == 4
        else if (nv == 3)
            quad_outputs(f->outs, v, m->s, m->blocks, topk, s->d, factors, 3, 1);
        else
            quad_outputs(f->outs, v, m->s, m->blocks, topk, s->d, factors, 4, 1);
#endif
    }
    if (!job->writes_map)
        write_rows(m->o, &c->out, c, b, h, at, s, 0, NQ, NULL);
}
#endif
