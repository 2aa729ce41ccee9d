/* Routed attention on float32, forward and backward, for vectors of LANES floats; other data types are converted
   where a region is packed and where a result is written.

   A task is one head of one image and a stretch of its query regions. What it needs of a key region is packed into
   the thread's scratch when the first query region asks for it (blocks_t): keys transposed, values by rows, padding
   in place, all float32 and contiguous, so that strides, padding and data types end there. For a query region:

       scores   S[i][j] = q_i . k_j * scale + bias_j                rows of queries, columns of routed keys
       softmax  P[i][j] = 2^((S[i][j] - max_i) * log2(e))
       output   o_i     = sum_j P[i][j] v_j / sum_j P[i][j]

   A region of few tokens would leave most of a tile empty: it goes one query at a time, by rows of keys.

   Q_ROWS queries are taken at a time. Their scores stay in the L1 cache, and a block of keys or values that was
   read once serves all of them.

   Shapes: T tokens of a query region, TK of a key region, K = topk * TK keys, D channels of a head, DP = D rounded up
   to whole vectors, KP = K rounded up to whole vectors. */

/* Queries of one register tile. */
#define NQ 4
/* Vectors of keys (NK) and of channels (NV) of a register tile: NQ * NK sums, NK operands and a factor must fit into
   the registers: 32 of AVX-512 and NEON, 16 of AVX2 and SSE2. */
#if LANES == 16 || defined(__aarch64__)
#define NK 4
#define NV 4
#else
#define NK 2
#define NV 2
#endif
/* Queries of a tile of outputs: by two vectors of channels that makes 16 sums of 32 registers or 12 of 16, enough to hide
   the latency of a fused operation on two ports. */
#if LANES == 16 || defined(__aarch64__)
#define MOST_QUERIES 8
#elif LANES == 8
#define MOST_QUERIES 6
#else
#define MOST_QUERIES NQ
#endif
/* Queries per block: their scores of 64 to 256 keys take 4 to 16 KiB of an L1 cache of 32 or 48 KiB. */
#define Q_ROWS 16
/* Keys whose values are added to all queries of a block before the next: 64 rows of 32 channels are 8 KiB. */
#define KEY_STRETCH 64
/* Queries of a region up to which they go one at a time: a register tile would be half empty. */
#define FEW_TOKENS 2
/* Blocks of a head are kept for its later query regions up to this size: half of a common L2 cache. */
#define KEPT_BYTES (1 << 20)

typedef struct {
    int64_t rows, cols, kv_cols; /* the grids of query regions and of key regions */
    int64_t t, tk, k, d, dp, kp, vectors;
    int64_t pitch; /* from a channel to the next in a block of columns: TK, or whole vectors where one block is all */
    int64_t regions, kv_regions;
    int64_t once;          /* blocks of four columns, read by one block of queries: never put side by side */
    int64_t direct;        /* values are read where they lie in the map */
    int64_t lone;          /* keys too: regions of few tokens */
    int64_t slots, kept; /* blocks in the scratch; kept: one for every key region, else one per route */
    int64_t parts, stretch;
    float factor; /* the scale */
} shape_t;

/* Whether the routed rows of a map serve as they lie: floats side by side, no padding, and, where several blocks of
   queries read them, not so that they push each other out of an L1 cache. It has at least 64 sets of 8 lines of 64
   bytes: rows 2^n lines apart share 64 / 2^n of the sets. */
static int reads_in_place(const attention_t *c, const map_t *m, const shape_t *s)
{
    if (c->dtype != FLOAT32 || m->channel != 1 || s->d != s->dp || c->kv_height % c->kv_region_h ||
        c->kv_width % c->kv_region_w)
        return 0;
    int64_t lines = m->token / 16, apart = min_of(lines & -lines, 64);
    return s->t <= NQ || m->token % 16 || min_of(s->k, KEY_STRETCH) <= 8 * 64 / max_of(apart, 1);
}

static shape_t shape_of(const attention_t *c, int64_t block_floats, int direct)
{
    shape_t s;
    s.rows = ceil_div(c->height, c->region_h);
    s.cols = ceil_div(c->width, c->region_w);
    s.kv_cols = ceil_div(c->kv_width, c->kv_region_w);
    s.regions = s.rows * s.cols;
    s.kv_regions = ceil_div(c->kv_height, c->kv_region_h) * s.kv_cols;
    s.t = c->region_h * c->region_w;
    s.tk = c->kv_region_h * c->kv_region_w;
    s.k = c->topk * s.tk;
    s.d = c->head_dim;
    s.dp = ceil_div(s.d, LANES) * LANES;
    s.vectors = ceil_div(s.k, LANES);
    s.kp = s.vectors * LANES;
    s.pitch = c->topk == 1 ? s.kp : s.tk;
    s.once = s.tk == 4 && s.t <= NQ && LANES > 4;
    s.direct = direct && reads_in_place(c, &c->v, &s);
    s.kept = c->topk > 1 && s.kv_regions * s.tk * (block_floats - s.direct * s.dp) * 4 <= KEPT_BYTES;
    s.slots = s.kept ? s.kv_regions : c->topk;
    s.factor = (float)c->scale;
    s.lone = s.t <= FEW_TOKENS && s.d == s.dp && c->k.channel == 1 && c->v.channel == 1;
    if (s.lone) {
        s.slots = s.kept = s.once = s.direct = 0;
        s.pitch = s.kp;
    }
    return s;
}

static int64_t route_of(const attention_t *c, int64_t b, int64_t h, int64_t r, int64_t slot)
{
    const char *at = c->routes + c->route_bytes * (b * c->route_image + h * c->route_head + r * c->route_region +
                                                   slot * c->route_slot);
    return c->route_bytes == 4 ? *(const int32_t *)at : *(const int64_t *)at;
}

/* The channels of head h of a token. */
static char *token_at(const map_t *m, int64_t dtype, int64_t b, int64_t y, int64_t x, int64_t h, int64_t d)
{
    return m->data + bytes_of(dtype) * (b * m->image + y * m->row + x * m->token + h * d * m->channel);
}

/* A region of a map: its first token, its tokens, and where the map ends. */
typedef struct {
    int64_t y, x, h, w, height, width;
} tile_t;

static tile_t query_tile(const attention_t *c, const shape_t *s, int64_t r)
{
    return (tile_t){r / s->cols * c->region_h, r % s->cols * c->region_w, c->region_h, c->region_w, c->height, c->width};
}

static tile_t key_tile(const attention_t *c, const shape_t *s, int64_t r)
{
    return (tile_t){r / s->kv_cols * c->kv_region_h, r % s->kv_cols * c->kv_region_w, c->kv_region_h, c->kv_region_w,
                    c->kv_height, c->kv_width};
}

/* Rows [T, DP] of a region as floats, times a factor, zero where the map ends. */
static void pack_rows(float *to, const map_t *m, const attention_t *c, int64_t b, int64_t h, tile_t at,
                      const shape_t *s, float factor)
{
    for (int64_t y = at.y; y < at.y + at.h; y++)
        for (int64_t x = at.x; x < at.x + at.w; x++, to += s->dp) {
            int64_t real = y < at.height && x < at.width ? s->d : 0;
            if (real)
                read_row(to, token_at(m, c->dtype, b, y, x, h, s->d), c->dtype, m->channel, s->d, factor);
            for (int64_t i = real; i < s->dp; i++)
                to[i] = 0;
        }
}

/* Tokens first to first + n of a region, from rows [n, DP], each times its factor. */
static void write_rows(const float *from, const map_t *m, const attention_t *c, int64_t b, int64_t h, tile_t at,
                       const shape_t *s, int64_t first, int64_t n, const float *factors)
{
    int64_t y = at.y + first / at.w, x = at.x + first % at.w;
    for (int64_t i = 0; i < n && first + i < at.h * at.w; i++, from += s->dp) {
        if (y < at.height && x < at.width)
            write_row(token_at(m, c->dtype, b, y, x, h, s->d), from, c->dtype, m->channel, s->d,
                      factors ? factors[i] : 1.0f);
        if (++x == at.x + at.w) {
            x = at.x;
            y++;
        }
    }
}

/* Asks for the tokens of a region before they are needed: in a map of many heads the rows of one are too far apart for
   the processor to guess. */
static void fetch_rows(const map_t *m, const attention_t *c, int64_t b, int64_t h, tile_t at, const shape_t *s)
{
    int64_t bytes = s->d * m->channel * bytes_of(c->dtype), step = m->token * bytes_of(c->dtype);
    for (int64_t y = at.y; y < min_of(at.y + at.h, at.height); y++) {
        const char *token = token_at(m, c->dtype, b, y, at.x, h, s->d);
        for (int64_t x = at.x; x < min_of(at.x + at.w, at.width); x++, token += step)
            for (int64_t i = 0; i < bytes; i += 64)
                __builtin_prefetch(token + i);
    }
}

/* --- key regions ------------------------------------------------------------------------------------ */

/* What a task holds of the key regions of its head. `columns` and `rows` lie in slots of TK * D and TK * DP floats;
   a slot has one transposed and one plain block of every map that is packed (keys and values). */
typedef struct {
    const attention_t *call;
    const shape_t *shape;
    int64_t b, h;
    int64_t maps;         /* forward: columns of k and rows of v; backward: columns of k and v, rows of k */
    int64_t *region_in;   /* [slots]: the region that a slot holds, -1 for none */
    float *slots, *spare; /* spare: [TK, DP] */
    int64_t slot_floats;
} blocks_t;

static int64_t slot_floats(const shape_t *s, int64_t backward)
{
    return (backward ? 2 : 1) * s->pitch * s->d + (backward || !s->direct ? s->tk * s->dp : 0);
}

static void pack_map(blocks_t *k, const map_t *m, int64_t region, float *columns, float *rows)
{
    const attention_t *c = k->call;
    const shape_t *s = k->shape;
    tile_t tile = key_tile(c, s, region);
    float *plain = rows ? rows : k->spare;
    int64_t inside = tile.y + tile.h <= tile.height && tile.x + tile.w <= tile.width;
    /* Columns are transposed from where the tokens lie if those are floats side by side, else from packed rows. */
    int64_t in_place = !rows && inside && c->dtype == FLOAT32 && m->channel == 1;
    if (!in_place)
        pack_rows(plain, m, c, k->b, k->h, tile, s, 1.0f);
    if (!columns)
        return;
    const float *at[LANES], *row = (const float *)token_at(m, FLOAT32, k->b, tile.y, tile.x, k->h, s->d), *token = row;
    int64_t x = 0;
    for (int64_t j = 0; j < s->tk; j += LANES) {
        int64_t n = min_of(LANES, s->tk - j);
        for (int64_t i = 0; i < n; i++) {
            at[i] = in_place ? token : plain + (j + i) * s->dp;
            token += m->token;
            if (++x == tile.w) {
                x = 0;
                token = row += m->row;
            }
        }
        transpose(columns + j, s->pitch, at, n, s->d);
    }
}

/* Where a region's blocks are, packed now if nobody asked before. `slot` is the place of the route. */
static float *block_of(blocks_t *k, int64_t region, int64_t slot)
{
    const shape_t *s = k->shape;
    if (s->kept)
        slot = region;
    float *at = k->slots + slot * k->slot_floats;
    if (k->region_in[slot] != region) {
        k->region_in[slot] = region;
        if (k->maps == 2 && s->direct) { /* [D, TK] of k */
            pack_map(k, &k->call->k, region, at, NULL);
        } else if (k->maps == 2) { /* [D, TK] of k, [TK, DP] of v */
            pack_map(k, &k->call->k, region, at, NULL);
            pack_map(k, &k->call->v, region, NULL, at + s->pitch * s->d);
        } else { /* [D, TK] of k, [D, TK] of v, [TK, DP] of k */
            pack_map(k, &k->call->k, region, at, at + 2 * s->pitch * s->d);
            pack_map(k, &k->call->v, region, at + s->pitch * s->d, NULL);
        }
    }
    return at;
}

/* One of a number of parts of a region: rows of tokens. */
static tile_t part_of(tile_t t, int64_t part, int64_t parts)
{
    int64_t first = t.h * part / parts;
    t.h = t.h * (part + 1) / parts - first;
    t.y += first;
    return t;
}

/* Asks for a part of what query region r will need: its tokens, and those of key regions that are not packed yet. All at once
   would keep what is computed meanwhile waiting for its own. */
static void fetch_next(const blocks_t *k, int64_t r, int64_t part, int64_t parts)
{
    const attention_t *c = k->call;
    const shape_t *s = k->shape;
    fetch_rows(&c->q, c, k->b, k->h, part_of(query_tile(c, s, r), part, parts), s);
    for (int64_t slot = 0; slot < c->topk; slot++) {
        int64_t region = route_of(c, k->b, k->h, r, slot);
        if (s->kept && k->region_in[region] == region)
            continue;
        tile_t tile = part_of(key_tile(c, s, region), part, parts);
        fetch_rows(&c->k, c, k->b, k->h, tile, s);
        fetch_rows(&c->v, c, k->b, k->h, tile, s);
    }
}

/* The routed columns [D, K] as vectors: vector c of channel d is at columns[c] + d * ld. Regions of whole vectors are
   read where they are; others are put side by side in `room` [D, KP]. Where every column is read once, by one block of
   queries, blocks of four columns stay where they are too: `columns` has one entry per block then, and ld is 0. */
static int64_t routed_columns(const shape_t *s, int64_t topk, float *const *blocks, int64_t offset,
                              const float **columns, float *room)
{
    if (s->pitch % LANES == 0) {
        int64_t c = 0;
        for (int64_t slot = 0; slot < topk; slot++)
            for (int64_t j = 0; j < s->pitch; j += LANES)
                columns[c++] = blocks[slot] + offset + j;
        return s->pitch;
    }
    if (s->once) {
        for (int64_t slot = 0; slot < s->kp / 4; slot++)
            columns[slot] = slot < topk ? blocks[slot] + offset : room; /* zeros */
        return 0;
    }
    for (int64_t slot = 0; slot < topk; slot++) {
        const float *from = blocks[slot] + offset;
        float *to = room + slot * s->tk;
        if (s->tk == 4) /* one 16-byte move, the size of regions of 2x2 */
            for (int64_t d = 0; d < s->d; d++)
                memcpy(to + d * s->kp, from + d * 4, 16);
        else if (s->tk < LANES)
            for (int64_t d = 0; d < s->d; d++)
                copy_few(to + d * s->kp, from + d * s->tk, s->tk);
        else
            for (int64_t d = 0; d < s->d; d++)
                memcpy(to + d * s->kp, from + d * s->tk, (size_t)s->tk * 4);
    }
    for (int64_t c = 0; c < s->vectors; c++)
        columns[c] = room + c * LANES;
    return s->kp;
}

/* What is added to the scores: minus infinity for keys that are padding without weight and for columns beyond K. */
static void bias_of(const attention_t *c, const shape_t *s, const int64_t *regions, float *bias)
{
    for (int64_t slot = 0; slot < c->topk; slot++) {
        tile_t at = key_tile(c, s, regions[slot]);
        for (int64_t j = 0; j < s->tk; j++) {
            int64_t real = at.y + j / at.w < at.height && at.x + j % at.w < at.width;
            bias[slot * s->tk + j] = real || !c->masked ? 0.0f : -INFINITY;
        }
    }
    for (int64_t j = s->k; j < s->kp; j++)
        bias[j] = -INFINITY;
}

/* --- register tiles --------------------------------------------------------------------------------- */

/* S[NQ, nk vectors] = q [NQ, D] times columns [D, nk vectors], plus bias. `quads`: the columns lie in blocks [D, 4]. */
INLINE void score_tile(float *s, int64_t kp, const float *q, int64_t dp, int64_t d, const float *const *columns,
                       int64_t ld, const float *bias, const int nk, const int quads)
{
    V sum[NQ][NK];
    UNROLL for (int i = 0; i < NQ; i++)
        UNROLL for (int j = 0; j < nk; j++) sum[i][j] = (V){0};
    const float *at[NK];
    UNROLL for (int j = 0; j < nk; j++) at[j] = columns[j];
    for (int64_t e = 0; e < d; e++) {
        V key[NK];
        UNROLL for (int j = 0; j < nk; j++)
            key[j] = quads ? load_quads(columns + j * (LANES / 4), 4 * e) : load(at[j] + e * ld);
        UNROLL for (int i = 0; i < NQ; i++)
        {
            V factor = splat(q[i * dp + e]);
            UNROLL for (int j = 0; j < nk; j++) sum[i][j] += factor * key[j];
        }
    }
    UNROLL for (int i = 0; i < NQ; i++)
        UNROLL for (int j = 0; j < nk; j++)
            store(s + i * kp + j * LANES, bias ? sum[i][j] + load(bias + j * LANES) : sum[i][j]);
}

/* S [rows, KP] of rows queries, a multiple of NQ, from what `routed_columns` gave. */
static void score(float *s, const shape_t *shape, const float *q, int64_t rows, const float *const *columns,
                  int64_t ld, const float *bias)
{
    int64_t kp = shape->kp, dp = shape->dp, d = shape->d;
    for (int64_t c = 0, nk; c < shape->vectors; c += nk) {
        const float *of_keys = bias ? bias + c * LANES : NULL;
        nk = c + NK <= shape->vectors ? NK : 1;
        for (int64_t i = 0; i < rows; i += NQ) {
            float *to = s + i * kp + c * LANES;
            const float *from = q + i * dp;
            if (ld && nk == NK)
                score_tile(to, kp, from, dp, d, columns + c, ld, of_keys, NK, 0);
            else if (ld)
                score_tile(to, kp, from, dp, d, columns + c, ld, of_keys, 1, 0);
            else if (nk == NK)
                score_tile(to, kp, from, dp, d, columns + c * (LANES / 4), 0, of_keys, NK, 1);
            else
                score_tile(to, kp, from, dp, d, columns + c * (LANES / 4), 0, of_keys, 1, 1);
        }
    }
}

/* o[nq][nv vectors from `first` on] (+)= w[nq, n] times n rows,
   times the factors, where there are any: these are the last keys. */
INLINE void output_tile(float *const *o, int64_t first, const float *w, int64_t kp, const float *const *rows, int64_t n,
                        int more, const float *factors, const int nq, const int nv)
{
    V sum[MOST_QUERIES][NV];
    UNROLL for (int i = 0; i < nq; i++)
        UNROLL for (int v = 0; v < nv; v++) sum[i][v] = (V){0};
    if (more)
        UNROLL for (int i = 0; i < nq; i++)
            UNROLL for (int v = 0; v < nv; v++) sum[i][v] = load(o[i] + first + v * LANES);
    for (int64_t j = 0; j < n; j++) {
        const float *row = rows[j] + first;
        V value[NV];
        UNROLL for (int v = 0; v < nv; v++) value[v] = load(row + v * LANES);
        UNROLL for (int i = 0; i < nq; i++)
        {
            V weight = splat(w[i * kp + j]);
            UNROLL for (int v = 0; v < nv; v++) sum[i][v] += weight * value[v];
        }
    }
    UNROLL for (int i = 0; i < nq; i++)
    {
        V factor = splat(factors ? factors[i] : 1.0f);
        UNROLL for (int v = 0; v < nv; v++) store(o[i] + first + v * LANES, sum[i][v] * factor);
    }
}

/* o [queries, DP] = w [queries, K] times the routed rows. */
static void weigh(float *o, const shape_t *s, const float *w, int64_t queries, const float *const *rows)
{
    int64_t dp = s->dp, kp = s->kp;
    for (int64_t j = 0; j < s->k; j += KEY_STRETCH) {
        int64_t n = min_of(KEY_STRETCH, s->k - j);
        for (int64_t i = 0; i < queries; i += NQ) {
            float *to[NQ];
            UNROLL for (int u = 0; u < NQ; u++) to[u] = o + (i + u) * dp;
            const float *weights = w + i * kp + j;
            int64_t v = 0;
            for (; v + NV * LANES <= dp; v += NV * LANES)
                output_tile(to, v, weights, kp, rows + j, n, j > 0, NULL, NQ, NV);
#if NV == 4
            if (dp - v == 3 * LANES)
                output_tile(to, v, weights, kp, rows + j, n, j > 0, NULL, NQ, 3);
            else if (dp - v == 2 * LANES)
                output_tile(to, v, weights, kp, rows + j, n, j > 0, NULL, NQ, 2);
#endif
            if (dp - v == LANES)
                output_tile(to, v, weights, kp, rows + j, n, j > 0, NULL, NQ, 1);
        }
    }
}

/* Where the routed rows are: in the blocks, or in the map itself. */
static void routed_rows(const blocks_t *k, float *const *blocks, int64_t offset, const int64_t *regions,
                        const float **rows)
{
    const attention_t *c = k->call;
    const shape_t *s = k->shape;
    for (int64_t slot = 0; slot < c->topk; slot++) {
        if (offset >= 0) {
            const float *at = blocks[slot] + offset;
            for (int64_t j = 0; j < s->tk; j++, at += s->dp)
                *rows++ = at;
            continue;
        }
        tile_t tile = key_tile(c, s, regions[slot]);
        for (int64_t y = tile.y; y < tile.y + tile.h; y++) {
            const float *at = (const float *)token_at(&c->v, FLOAT32, k->b, y, tile.x, k->h, s->d);
            for (int64_t x = 0; x < tile.w; x++, at += c->v.token)
                *rows++ = at;
        }
    }
}

/* --- scratch ---------------------------------------------------------------------------------------- */

typedef struct {
    const attention_t *call;
    shape_t shape;
    float *key_sums, *value_sums; /* backward: [parts, B, heads, Rk, TK, DP] */
} attention_job_t;

/* The scratch of a task as pieces of one allocation. */
typedef struct {
    char *base; /* NULL to learn how many bytes are used */
    int64_t used;
} pieces_t;

static void *piece(pieces_t *p, int64_t bytes)
{
    void *at = p->base ? p->base + p->used : NULL;
    p->used += ceil_div(bytes, 64) * 64;
    return at;
}

typedef struct {
    int64_t *region_in, *regions;
    float **blocks;
    const float **columns, **value_columns, **rows;
    const char **key_tokens, **value_tokens, *zero; /* regions of few tokens: [K], [K], a token that is padding */
    float *slots, *spare, *room, *value_room, *bias;
    float *q, *s, *o;                       /* [T + Q_ROWS, DP], [Q_ROWS, KP], [Q_ROWS, DP] */
    float *grad, *ds, *plain_q;             /* backward */
} scratch_t;

static scratch_t lay_out(pieces_t *p, const shape_t *s, int64_t topk, int64_t backward)
{
    scratch_t m = {0};
    int64_t q_rows = ceil_div(s->t, Q_ROWS) * Q_ROWS;
    m.region_in = piece(p, s->slots * 8);
    m.regions = piece(p, topk * 8);
    m.blocks = piece(p, topk * (int64_t)sizeof(float *));
    m.columns = piece(p, s->kp / 4 * (int64_t)sizeof(float *));
    m.slots = piece(p, s->slots * slot_floats(s, backward) * 4);
    m.spare = piece(p, s->tk * s->dp * 4);
    m.bias = piece(p, s->kp * 4);
    m.q = piece(p, q_rows * s->dp * 4);
    m.s = piece(p, Q_ROWS * s->kp * 4);
    m.o = piece(p, Q_ROWS * s->dp * 4);
    int64_t joins = s->pitch % LANES != 0;
    m.room = piece(p, joins * s->d * s->kp * 4);
    m.rows = piece(p, s->k * (int64_t)sizeof(float *));
    m.key_tokens = piece(p, s->lone * s->kp * (int64_t)sizeof(char *));
    m.value_tokens = piece(p, s->lone * s->kp * (int64_t)sizeof(char *));
    m.zero = piece(p, s->lone * s->d * 4);
    if (backward) {
        m.value_columns = piece(p, s->kp / 4 * (int64_t)sizeof(float *));
        m.value_room = piece(p, joins * s->d * s->kp * 4);
        m.grad = piece(p, q_rows * s->dp * 4);
        m.plain_q = piece(p, q_rows * s->dp * 4);
        m.ds = piece(p, Q_ROWS * s->kp * 4);
    }
    return m;
}

static size_t scratch_bytes(const shape_t *s, int64_t topk, int64_t backward)
{
    pieces_t nothing = {NULL, 0};
    lay_out(&nothing, s, topk, backward);
    return (size_t)nothing.used;
}

/* Image, head and query regions of a task. */
static void task_range(const attention_t *c, const shape_t *s, int64_t task, int64_t *b, int64_t *h, int64_t *first,
                       int64_t *end)
{
    int64_t part = task % s->parts, group = task / s->parts;
    *h = group % c->heads;
    *b = group / c->heads;
    *first = part * s->stretch;
    *end = min_of(*first + s->stretch, s->regions);
}

static blocks_t open_blocks(const attention_t *c, const shape_t *s, scratch_t *m, int64_t b, int64_t h,
                            int64_t backward)
{
    blocks_t k = {c, s, b, h, backward ? 3 : 2, m->region_in, m->slots, m->spare, slot_floats(s, backward)};
    for (int64_t i = 0; i < s->slots; i++)
        m->region_in[i] = -1;
    if (s->lone)
        memset((void *)m->zero, 0, (size_t)s->d * 4);
    if (s->pitch != s->tk) /* columns beyond K are read, and must hold numbers */
        memset(m->slots, 0, (size_t)(s->slots * slot_floats(s, backward)) * 4);
    if (s->pitch % LANES) {
        memset(m->room, 0, (size_t)(s->d * s->kp) * 4);
        if (backward)
            memset(m->value_room, 0, (size_t)(s->d * s->kp) * 4);
    }
    return k;
}

/* --- regions of few tokens -------------------------------------------------------------------------- */

/* Where the routed keys and values of query region r lie; what is padding, and what fills the last vector, is `zero`. */
static void find_tokens(const attention_t *c, const shape_t *s, const scratch_t *m, int64_t b, int64_t h, int64_t r)
{
    const char **keys = m->key_tokens, **values = m->value_tokens;
    for (int64_t slot = 0; slot < c->topk; slot++) {
        tile_t at = key_tile(c, s, route_of(c, b, h, r, slot));
        for (int64_t y = at.y; y < at.y + at.h; y++)
            for (int64_t x = at.x; x < at.x + at.w; x++) {
                int64_t real = y < at.height && x < at.width;
                *keys++ = real ? token_at(&c->k, c->dtype, b, y, x, h, s->d) : m->zero;
                *values++ = real ? token_at(&c->v, c->dtype, b, y, x, h, s->d) : m->zero;
            }
    }
    for (int64_t j = s->k; j < s->kp; j++)
        *keys++ = *values++ = m->zero;
}

/* to[j] = x . tokens[j], the sums of a whole vector of keys at once; where `hidden` is a token, its place and those up to
   KP get minus infinity. */
INLINE void dot_tokens(float *to, const float *x, const char *const *tokens, const char *hidden, const shape_t *s,
                       const int dtype)
{
    const int size = dtype == FLOAT32 ? 4 : 2;
    for (int64_t j = 0; j < s->kp; j += LANES) {
        V sum[LANES];
        UNROLL for (int i = 0; i < LANES; i++) sum[i] = (V){0};
        for (int64_t e = 0; e < s->d; e += LANES) {
            V part = load(x + e);
            UNROLL for (int i = 0; i < LANES; i++)
                sum[i] += part * read_vector(tokens[j + i] + e * size, dtype);
        }
        store(to + j, sums_of(sum));
    }
    if (hidden)
        for (int64_t j = 0; j < s->k; j++)
            to[j] = tokens[j] == hidden ? -INFINITY : to[j];
    for (int64_t j = s->k; j < s->kp; j++)
        to[j] = -INFINITY;
}

/* nv vectors of the sum of w[j] * tokens[j], in two sums: each alone would wait for itself. */
INLINE void weigh_vectors(float *to, const float *w, const char *const *tokens, int64_t k, int64_t at, const int dtype,
                          const int nv)
{
    V even[4], odd[4];
    UNROLL for (int v = 0; v < nv; v++) even[v] = odd[v] = (V){0};
    const int step = LANES * (dtype == FLOAT32 ? 4 : 2);
    int64_t j = 0;
    for (; j + 2 <= k; j += 2) {
        V one = splat(w[j]), two = splat(w[j + 1]);
        const char *first = tokens[j] + at, *second = tokens[j + 1] + at;
        UNROLL for (int v = 0; v < nv; v++)
        {
            even[v] += one * read_vector(first + v * step, dtype);
            odd[v] += two * read_vector(second + v * step, dtype);
        }
    }
    if (j < k)
        UNROLL for (int v = 0; v < nv; v++) even[v] += splat(w[j]) * read_vector(tokens[j] + at + v * step, dtype);
    UNROLL for (int v = 0; v < nv; v++) store(to + v * LANES, even[v] + odd[v]);
}

/* to = sum of w[j] * tokens[j]. */
INLINE void weigh_tokens(float *to, const float *w, const char *const *tokens, const shape_t *s, const int dtype)
{
    const int size = dtype == FLOAT32 ? 4 : 2;
    for (int64_t e = 0, nv; e < s->d; e += nv * LANES) {
        int64_t left = (s->d - e) / LANES;
        nv = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (nv == 4)
            weigh_vectors(to + e, w, tokens, s->k, e * size, dtype, 4);
        else if (nv == 2)
            weigh_vectors(to + e, w, tokens, s->k, e * size, dtype, 2);
        else
            weigh_vectors(to + e, w, tokens, s->k, e * size, dtype, 1);
    }
}

/* A head is cut into parts where there are fewer heads than threads want: four tasks per thread even out. */
static void cut(shape_t *s, int64_t heads, int64_t threads, int64_t tasks_per_thread)
{
    s->parts = min_of(s->regions, ceil_div(tasks_per_thread * threads, heads));
    s->stretch = ceil_div(s->regions, s->parts);
    s->parts = ceil_div(s->regions, s->stretch);
}

/* --- backward --------------------------------------------------------------------------------------- */

/* Queries of a tile of gather: their rows lie in registers, twice NQ where there are 32 of those. */
#define NG (NV == 4 ? 2 * NQ : NQ)

/* sums[n, nv vectors] += w[nq, n] transposed times rows [nq, nv vectors]. */
INLINE void gather_tile(float *sums, int64_t dp, const float *w, int64_t kp, const float *rows, int64_t n,
                        const int nq, const int nv)
{
    V row[NG][2];
    UNROLL for (int i = 0; i < nq; i++)
        UNROLL for (int v = 0; v < nv; v++) row[i][v] = load(rows + i * dp + v * LANES);
    for (int64_t j = 0; j < n; j++) {
        V sum[2];
        UNROLL for (int v = 0; v < nv; v++) sum[v] = load(sums + j * dp + v * LANES);
        UNROLL for (int i = 0; i < nq; i++)
        {
            V weight = splat(w[i * kp + j]);
            UNROLL for (int v = 0; v < nv; v++) sum[v] += weight * row[i][v];
        }
        UNROLL for (int v = 0; v < nv; v++) store(sums + j * dp + v * LANES, sum[v]);
    }
}

/* sums [TK, DP] += w [rows, TK] transposed times from [rows, DP]; rows is a multiple of nq. */
INLINE void gather_rows(float *sums, const shape_t *s, const float *w, int64_t rows, const float *from, const int nq)
{
    int64_t dp = s->dp;
    for (int64_t i = 0; i < rows; i += nq) {
        int64_t v = 0;
        for (; v + 2 * LANES <= dp; v += 2 * LANES)
            gather_tile(sums + v, dp, w + i * s->kp, s->kp, from + i * dp + v, s->tk, nq, 2);
        if (v < dp)
            gather_tile(sums + v, dp, w + i * s->kp, s->kp, from + i * dp + v, s->tk, nq, 1);
    }
}

/* What queries say to the routed keys: sums of region regions[slot] [TK, DP] += w^T rows. */
static void gather(float *sums, const shape_t *s, const float *w, int64_t rows, const float *from,
                   const int64_t *regions, int64_t topk)
{
    for (int64_t slot = 0; slot < topk; slot++) {
        float *to = sums + regions[slot] * s->tk * s->dp;
        if (rows % NG)
            gather_rows(to, s, w + slot * s->tk, rows, from, NQ);
        else
            gather_rows(to, s, w + slot * s->tk, rows, from, NG);
    }
}

/* Scores s become weights p = e^(s - lse), and ds, the gradients of those, becomes that of the scores before their
   scale, p * (ds - sum of p * ds) * scale. The sum is the gradient of the output times the output, which need not be
   kept for it. */
INLINE void score_grads(float *s, float *ds, int64_t n, float lse, float scale)
{
    V top = splat(lse), sum = {0};
    for (int64_t j = 0; j < n; j += LANES) {
        V weight = exp2_of((load(s + j) - top) * splat(LOG2_E));
        store(s + j, weight);
        sum += weight * load(ds + j);
    }
    V delta = splat(sum_of(sum)), by = splat(scale);
    for (int64_t j = 0; j < n; j += LANES)
        store(ds + j, load(s + j) * (load(ds + j) - delta) * by);
}

/* The gradients of a region of few tokens; see lone_forward and backward_task. */
INLINE void lone_backward(const attention_t *c, const shape_t *s, const scratch_t *m, int64_t b, int64_t h, int64_t r,
                          float *key_sums, float *value_sums, const int dtype)
{
    tile_t at = query_tile(c, s, r);
    const float *lse = c->lse + ((b * c->heads + h) * s->regions + r) * s->t;
    find_tokens(c, s, m, b, h, r);
    pack_rows(m->q, &c->q, c, b, h, at, s, s->factor);
    pack_rows(m->plain_q, &c->q, c, b, h, at, s, 1.0f);
    pack_rows(m->grad, &c->grad, c, b, h, at, s, 1.0f);
    for (int64_t i = 0; i < s->t; i++) {
        const float *q = m->plain_q + i * s->dp, *g = m->grad + i * s->dp;
        dot_tokens(m->s, m->q + i * s->dp, m->key_tokens, c->masked ? m->zero : NULL, s, dtype);
        dot_tokens(m->ds, g, m->value_tokens, NULL, s, dtype);
        for (int64_t j = s->k; j < s->kp; j++)
            m->ds[j] = 0;
        score_grads(m->s, m->ds, s->kp, lse[i], (float)c->scale);
        weigh_tokens(m->o, m->ds, m->key_tokens, s, dtype);
        write_rows(m->o, &c->dq, c, b, h, at, s, i, 1, NULL);
        const float *p = m->s, *ds = m->ds;
        for (int64_t slot = 0; slot < c->topk; slot++) {
            int64_t place = route_of(c, b, h, r, slot) * s->tk * s->dp;
            for (int64_t j = 0; j < s->tk; j++, place += s->dp, p++, ds++)
                for (int64_t e = 0; e < s->d; e += LANES) {
                    store(key_sums + place + e, load(key_sums + place + e) + splat(*ds) * load(q + e));
                    store(value_sums + place + e, load(value_sums + place + e) + splat(*p) * load(g + e));
                }
        }
    }
}

static void backward_task(void *context, int64_t task, char *memory)
{
    const attention_job_t *job = context;
    const attention_t *c = job->call;
    const shape_t *s = &job->shape;
    pieces_t pieces = {memory, 0};
    scratch_t m = lay_out(&pieces, s, c->topk, 1);
    int64_t b, h, first, end, uneven = s->kp != s->k || c->masked;
    task_range(c, s, task, &b, &h, &first, &end);
    blocks_t keys = open_blocks(c, s, &m, b, h, 1);
    int64_t map = s->kv_regions * s->tk * s->dp; /* numbers of one head's gradient */
    int64_t place = (task % s->parts * c->batch * c->heads + b * c->heads + h) * map;
    float *key_sums = job->key_sums + place, *value_sums = job->value_sums + place;
    memset(key_sums, 0, (size_t)map * 4);
    memset(value_sums, 0, (size_t)map * 4);
    float scale = (float)c->scale;
    for (int64_t r = first; r < end; r++) {
        if (s->lone) {
            if (c->dtype == FLOAT32)
                lone_backward(c, s, &m, b, h, r, key_sums, value_sums, FLOAT32);
            else if (c->dtype == BFLOAT16)
                lone_backward(c, s, &m, b, h, r, key_sums, value_sums, BFLOAT16);
            else
                lone_backward(c, s, &m, b, h, r, key_sums, value_sums, FLOAT16);
            continue;
        }
        for (int64_t slot = 0; slot < c->topk; slot++) {
            m.regions[slot] = route_of(c, b, h, r, slot);
            m.blocks[slot] = block_of(&keys, m.regions[slot], slot);
        }
        int64_t ld = routed_columns(s, c->topk, m.blocks, 0, m.columns, m.room);
        routed_columns(s, c->topk, m.blocks, s->pitch * s->d, m.value_columns, m.value_room);
        routed_rows(&keys, m.blocks, 2 * s->pitch * s->d, m.regions, m.rows);
        if (c->masked || (uneven && r == first))
            bias_of(c, s, m.regions, m.bias);
        tile_t at = query_tile(c, s, r);
        int64_t rows = ceil_div(s->t, NQ) * NQ;
        float *maps[2] = {m.plain_q, m.grad};
        const map_t *from[2] = {&c->q, &c->grad};
        for (int i = 0; i < 2; i++) {
            pack_rows(maps[i], from[i], c, b, h, at, s, 1.0f);
            memset(maps[i] + s->t * s->dp, 0, (size_t)((rows - s->t) * s->dp) * 4);
        }
        for (int64_t i = 0; i < rows * s->dp; i += LANES)
            store(m.q + i, load(m.plain_q + i) * splat(s->factor));
        const float *lse = c->lse + ((b * c->heads + h) * s->regions + r) * s->t;
        for (int64_t i = 0; i < rows; i += Q_ROWS) {
            int64_t n = min_of(Q_ROWS, rows - i), part = i / Q_ROWS, parts = ceil_div(rows, Q_ROWS);
            if (r + 1 < end && !s->once) {
                fetch_next(&keys, r + 1, part, parts);
                fetch_rows(&c->grad, c, b, h, part_of(query_tile(c, s, r + 1), part, parts), s);
            }
            score(m.s, s, m.q + i * s->dp, n, m.columns, ld, uneven ? m.bias : NULL);
            score(m.ds, s, m.grad + i * s->dp, n, m.value_columns, ld, NULL);
            for (int64_t u = 0; u < n; u++)
                score_grads(m.s + u * s->kp, m.ds + u * s->kp, s->kp, i + u < s->t ? lse[i + u] : 0.0f, scale);
            /* Tokens that are padding have a gradient of zero and weigh nothing below. */
            weigh(m.o, s, m.ds, n, m.rows);
            write_rows(m.o, &c->dq, c, b, h, at, s, i, n, NULL);
            gather(value_sums, s, m.s, n, m.grad + i * s->dp, m.regions, c->topk);
            gather(key_sums, s, m.ds, n, m.plain_q + i * s->dp, m.regions, c->topk);
        }
    }
}

/* Adds up the parts of a key region of a head and writes them to the maps. */
static void finish_task(void *context, int64_t task, char *memory)
{
    const attention_job_t *job = context;
    const attention_t *c = job->call;
    const shape_t *s = &job->shape;
    int64_t region = task % s->kv_regions, group = task / s->kv_regions, b = group / c->heads, h = group % c->heads;
    int64_t block = s->tk * s->dp, all = c->batch * c->heads * s->kv_regions * block;
    float *sums[2] = {job->key_sums + task * block, job->value_sums + task * block};
    const map_t *to[2] = {&c->dk, &c->dv};
    for (int i = 0; i < 2; i++) {
        for (int64_t part = 1; part < s->parts; part++)
            for (int64_t j = 0; j < block; j += LANES)
                store(sums[i] + j, load(sums[i] + j) + load(sums[i] + part * all + j));
        write_rows(sums[i], to[i], c, b, h, key_tile(c, s, region), s, 0, s->tk, NULL);
    }
    (void)memory;
}

/* Gradients of q, k and v. A task adds what its queries say to keys and values to sums of its own, in the order of
   the regions; the parts of a head are then added in order. So the same number of threads gives the same bits. */
static int64_t backward(const attention_t *c)
{
    attention_job_t job = {c, shape_of(c, 2 * c->head_dim + ceil_div(c->head_dim, LANES) * LANES, 0), NULL, NULL};
    shape_t *s = &job.shape;
    int64_t heads = c->batch * c->heads;
    cut(s, heads, c->threads, 1);
    int64_t numbers = s->parts * heads * s->kv_regions * s->tk * s->dp;
    void *sums;
    if (posix_memalign(&sums, 64, (size_t)numbers * 8))
        return NO_MEMORY;
    job.key_sums = sums;
    job.value_sums = job.key_sums + numbers;
    int64_t failed = spread(backward_task, &job, heads * s->parts, scratch_bytes(s, c->topk, 1), c->threads);
    if (!failed)
        failed = spread(finish_task, &job, heads * s->kv_regions, 0, c->threads);
    free(sums);
    return failed;
}
