/* The forward pass of any region, by tiles of four queries; its words and shapes are those of attention.h.

   Queries are read where they lie, and outputs go where they belong, where both are floats side by side; others are packed
   and unpacked by regions. The scale comes with the softmax, so that a query is read as it is:

       weights  P[i][j] = 2^((S[i][j] - max_i) * scale * log2(e))

   Scores that fit into the registers of a tile become weights before they leave them. */

/* Vectors of keys of a tile of scores, beside the factor and the keys themselves in the registers. */
#if LANES == 8
#define KEY_VECTORS 3
#else
#define KEY_VECTORS NK
#endif

typedef struct {
    const attention_t *call;
    shape_t shape;
    int64_t quads;      /* regions of 2x2 tokens: quads.h */
    int64_t reads_map;  /* queries are read where they lie */
    int64_t writes_map; /* outputs go where they belong */
    int64_t packs;      /* regions of few tokens (few.h): keys and values of a head are packed once, [Rk, TK, DP] each */
    float scale, by;    /* of the logits, positive; and times log2(e) */
    float sign;         /* of the scale: queries have it */
} forward_job_t;

typedef struct {
    int64_t *open; /* 1 + the head whose blocks are held; 0 when a call begins */
    scratch_t m;
    const float **queries; /* [T in whole tiles] */
    float **outs;
    float *zero, *nowhere; /* [DP]: what is read and written for tokens that are not there */
    float *thin;           /* quads: four queries, [D, 4] */
    float *packed;         /* see forward_job_t.packs */
} forward_scratch_t;

static forward_scratch_t lay_out_forward(pieces_t *p, const forward_job_t *job)
{
    const shape_t *s = &job->shape;
    forward_scratch_t f;
    int64_t rows = ceil_div(s->t, NQ) * NQ;
    f.open = piece(p, 8);
    f.m = lay_out(p, s, job->call->topk, 0);
    f.queries = piece(p, rows * (int64_t)sizeof(float *));
    f.outs = piece(p, rows * (int64_t)sizeof(float *));
    f.zero = piece(p, s->dp * 4);
    f.nowhere = piece(p, s->dp * 4);
    f.thin = piece(p, s->d * 16);
    f.packed = piece(p, job->packs * 2 * s->kv_regions * s->tk * s->dp * 4);
    return f;
}

/* Finds the rows of a region's queries and outputs. Tokens that are not there are zeros, and go nowhere. */
static void find_rows(const forward_job_t *job, forward_scratch_t *f, int64_t b, int64_t h, tile_t at)
{
    const attention_t *c = job->call;
    const shape_t *s = &job->shape;
    int64_t i = 0, rows = ceil_div(s->t, NQ) * NQ;
    if (!job->reads_map)
        pack_rows(f->m.q, &c->q, c, b, h, at, s, job->sign);
    for (int64_t y = at.y; y < at.y + at.h; y++) {
        int64_t real = y < at.height ? min_of(at.w, at.width - at.x) : 0;
        const float *from = (const float *)token_at(&c->q, FLOAT32, b, y, at.x, h, s->d);
        float *to = (float *)token_at(&c->out, FLOAT32, b, y, at.x, h, s->d);
        for (int64_t x = 0; x < at.w; x++, i++) {
            f->queries[i] = !job->reads_map ? f->m.q + i * s->dp : x < real ? from + x * c->q.token : f->zero;
            f->outs[i] = !job->writes_map ? f->m.o + i % Q_ROWS * s->dp : x < real ? to + x * c->out.token : f->nowhere;
        }
    }
    for (; i < rows; i++) {
        f->queries[i] = f->zero;
        f->outs[i] = f->nowhere;
    }
}

/* What is left of NQ softmaxes: 1 / their sums and, where `lse` is, the logs of the sums of n of them. */
INLINE void finish_softmax(const forward_job_t *job, V tops, V sums, float *factors, float *lse, int64_t n)
{
    V inverse = splat(1.0f) / sums;
    memcpy(factors, &inverse, NQ * 4);
    if (lse) {
        float top[LANES], sum[LANES];
        store(top, tops);
        store(sum, sums);
        for (int64_t i = 0; i < min_of(n, NQ); i++)
            lse[i] = top[i] * job->scale + logf(sum[i]);
    }
}

/* --- scores and weights of four queries -------------------------------------------------------------- */

/* sum[NQ][nk] = q [NQ, D] times columns [D, nk vectors], plus bias. */
INLINE void score_sums(V (*sum)[KEY_VECTORS], const float *const *q, int64_t d, const float *const *columns, int64_t ld,
                       const float *bias, const int nk)
{
    const float *from[NQ], *at[KEY_VECTORS];
    UNROLL for (int i = 0; i < NQ; i++) from[i] = q[i];
    UNROLL for (int j = 0; j < nk; j++) at[j] = columns[j];
    UNROLL for (int i = 0; i < NQ; i++)
        UNROLL for (int j = 0; j < nk; j++) sum[i][j] = (V){0};
    for (int64_t e = 0; e < d; e++) {
        V key[KEY_VECTORS];
        UNROLL for (int j = 0; j < nk; j++) key[j] = load(at[j] + e * ld);
        UNROLL for (int i = 0; i < NQ; i++)
        {
            V factor = splat(from[i][e]);
            UNROLL for (int j = 0; j < nk; j++) sum[i][j] += factor * key[j];
        }
    }
    if (bias)
        UNROLL for (int j = 0; j < nk; j++)
        {
            V of_keys = load(bias + j * LANES);
            UNROLL for (int i = 0; i < NQ; i++) sum[i][j] += of_keys;
        }
}

/* Weights w [NQ, KP], before they are divided by their sums, of keys that one tile holds. */
INLINE void weights_at_once(const forward_job_t *job, float *w, const float *const *q, const float *const *columns,
                            int64_t ld, const float *bias, float *factors, float *lse, int64_t n, const int nk)
{
    V x[NQ][KEY_VECTORS], top[NQ], sum[NQ], by = splat(job->by);
    score_sums(x, q, job->shape.d, columns, ld, bias, nk);
    UNROLL for (int i = 0; i < NQ; i++)
    {
        top[i] = x[i][0];
        UNROLL for (int j = 1; j < nk; j++) top[i] = larger(top[i], x[i][j]);
    }
    V tops = across_four(top, 1);
    spread_four(top, tops);
    UNROLL for (int i = 0; i < NQ; i++)
    {
        sum[i] = (V){0};
        UNROLL for (int j = 0; j < nk; j++)
        {
            V e = exp2_of((x[i][j] - top[i]) * by);
            store(w + i * job->shape.kp + j * LANES, e);
            sum[i] += e;
        }
    }
    finish_softmax(job, tops, across_four(sum, 0), factors, lse, n);
}

/* The same of any number of keys, whose scores wait in w. */
static void weights_in_turn(const forward_job_t *job, float *w, const float *const *q, const float *const *columns,
                            int64_t ld, const float *bias, float *factors, float *lse, int64_t n)
{
    int64_t kp = job->shape.kp, d = job->shape.d, vectors = job->shape.vectors;
    for (int64_t c = 0, nk; c < vectors; c += nk) {
        V x[NQ][KEY_VECTORS];
        const float *of_keys = bias ? bias + c * LANES : NULL;
        int64_t left = vectors - c;
        nk = left == KEY_VECTORS + 1 && KEY_VECTORS == 3 ? 2 : min_of(left, KEY_VECTORS);
#define SCORES(most)                                                     \
    if (nk == most) {                                                    \
        score_sums(x, q, d, columns + c, ld, of_keys, most);             \
        UNROLL for (int i = 0; i < NQ; i++)                              \
            UNROLL for (int j = 0; j < most; j++)                        \
                store(w + i * kp + (c + j) * LANES, x[i][j]);            \
    }
#if KEY_VECTORS == 4
        SCORES(4)
#endif
#if KEY_VECTORS >= 3
        SCORES(3)
#endif
        SCORES(2)
        SCORES(1)
#undef SCORES
    }
    V top[NQ], sum[NQ], by = splat(job->by);
    UNROLL for (int i = 0; i < NQ; i++)
    {
        top[i] = load(w + i * kp);
        sum[i] = (V){0};
    }
    for (int64_t c = 1; c < vectors; c++)
        UNROLL for (int i = 0; i < NQ; i++) top[i] = larger(top[i], load(w + i * kp + c * LANES));
    V tops = across_four(top, 1);
    spread_four(top, tops);
    for (int64_t c = 0; c < vectors; c++)
        UNROLL for (int i = 0; i < NQ; i++)
        {
            float *at = w + i * kp + c * LANES;
            V e = exp2_of((load(at) - top[i]) * by);
            store(at, e);
            sum[i] += e;
        }
    finish_softmax(job, tops, across_four(sum, 0), factors, lse, n);
}

static void weights_of(const forward_job_t *job, float *w, const float *const *q, const float *const *columns, int64_t ld,
                       const float *bias, float *factors, float *lse, int64_t n)
{
    int64_t vectors = job->shape.vectors;
    if (vectors == KEY_VECTORS)
        weights_at_once(job, w, q, columns, ld, bias, factors, lse, n, KEY_VECTORS);
    else if (vectors == 2)
        weights_at_once(job, w, q, columns, ld, bias, factors, lse, n, 2);
    else if (vectors == 1)
        weights_at_once(job, w, q, columns, ld, bias, factors, lse, n, 1);
    else
        weights_in_turn(job, w, q, columns, ld, bias, factors, lse, n);
}

/* --- outputs ----------------------------------------------------------------------------------------- */

/* Outputs of a number of queries, a multiple of NQ: weights w [queries, K] times the routed rows, times the factors. */
static void outputs_of(float *const *o, const shape_t *s, const float *w, int64_t queries, const float *const *rows,
                       const float *factors)
{
    int64_t dp = s->dp, kp = s->kp;
    for (int64_t j = 0; j < s->k; j += KEY_STRETCH) {
        int64_t n = min_of(KEY_STRETCH, s->k - j), more = j > 0, last = j + n == s->k;
        for (int64_t v = 0, nv; v < dp; v += nv * LANES) {
            nv = min_of(NV, (dp - v) / LANES);
            for (int64_t i = 0, nq; i < queries; i += nq) {
                const float *weights = w + i * kp + j, *by = last ? factors + i : NULL;
                int64_t left = queries - i;
                /* What is left must be a multiple of 4, too. */
                nq = nv > 2 || left < MOST_QUERIES || (MOST_QUERIES == 6 && left == 8) ? NQ : MOST_QUERIES;
#define OUTPUTS(queries, vectors)           \
    if (nq == queries && nv == vectors)     \
        output_tile(o + i, v, weights, kp, rows + j, n, (int)more, by, queries, vectors);
#if NV == 4
                OUTPUTS(NQ, 4)
                OUTPUTS(NQ, 3)
#endif
#if MOST_QUERIES > NQ
                OUTPUTS(MOST_QUERIES, 2)
                OUTPUTS(MOST_QUERIES, 1)
#endif
                OUTPUTS(NQ, 2)
                OUTPUTS(NQ, 1)
#undef OUTPUTS
            }
        }
    }
}

/* --- any region -------------------------------------------------------------------------------------- */

static void attend_region(const forward_job_t *job, forward_scratch_t *f, blocks_t *keys, int64_t r, int64_t first,
                          int64_t end)
{
    const attention_t *c = job->call;
    const shape_t *s = &job->shape;
    scratch_t *m = &f->m;
    int64_t b = keys->b, h = keys->h, uneven = s->kp != s->k || c->masked;
    for (int64_t slot = 0; slot < c->topk; slot++) {
        m->regions[slot] = route_of(c, b, h, r, slot);
        m->blocks[slot] = block_of(keys, m->regions[slot], slot);
    }
    int64_t ld = routed_columns(s, c->topk, m->blocks, 0, m->columns, m->room);
    routed_rows(keys, m->blocks, s->direct ? -1 : s->pitch * s->d, m->regions, m->rows);
    if (c->masked || (uneven && r == first))
        bias_of(c, s, m->regions, m->bias);
    tile_t at = query_tile(c, s, r);
    find_rows(job, f, b, h, at);
    int64_t rows = ceil_div(s->t, NQ) * NQ;
    float *lse = c->lse ? c->lse + ((b * c->heads + h) * s->regions + r) * s->t : NULL;
    for (int64_t i = 0; i < rows; i += Q_ROWS) {
        int64_t n = min_of(Q_ROWS, rows - i);
        float factors[Q_ROWS];
        if (r + 1 < end)
            fetch_next(keys, r + 1, i / Q_ROWS, ceil_div(rows, Q_ROWS));
        for (int64_t u = 0; u < n; u += NQ)
            weights_of(job, m->s + u * s->kp, f->queries + i + u, m->columns, ld, uneven ? m->bias : NULL, factors + u,
                       lse ? lse + i + u : NULL, s->t - i - u);
        outputs_of(f->outs + i, s, m->s, n, m->rows, factors);
        if (!job->writes_map)
            write_rows(m->o, &c->out, c, b, h, at, s, i, n, NULL);
    }
}
