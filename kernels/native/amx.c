/* Matrix tiles of Intel's server processors since 2023 (AMX-BF16): the forward pass on bfloat16. All else is AVX-512's.

   A tile is 16 rows of 64 bytes; _tile_dpbf16ps(C, A, B) adds to C [16 queries, 16 columns] the product of
   A [16 queries, 32 numbers] and B, where B [16, 16] holds pairs: two numbers that follow one another in the sum side
   by side. So keys are packed as [channel pairs, keys] and values as [key pairs, channels], words of 32 bits:

       scores  A = queries [M, 32 channels]   B = keys   [16 channel pairs, 16 keys]
       output  A = weights [M, 32 keys]       B = values [16 key pairs, 16 channels]

   A region of an odd number of keys gets one more, without weight. Rows of A and C cost time, rows of B do not: regions
   of fewer than 16 queries use tiles of as many rows. Up to FEW_QUERIES they fill so little of a tile that AVX-512 is
   faster: four take it half the time. The softmax between the products is AVX-512's, in float32. */
#include "call.h"

#if defined(HAVE_AMX)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target( \
    "avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#endif
#define LANES 16
#define ROUNDS_TO_BFLOAT16 /* in one instruction */
#include "simd.h"

#include "attention.h"
#include "norm.h"

/* Numbers of the tiles: two sums, two operands of the kind B, up to four of the kind A (128 channels of a query). */
#define C0 0
#define C1 1
#define B0 2
#define B1 3
#define A0 4
#define A1 5
#define A2 6
#define A3 7
enum { TILES = 8, FEW_QUERIES = 4 };
enum { TILE = 16, DEEP = 32 }; /* rows, and numbers of a sum that one product takes */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config_t;

typedef struct {
    const attention_t *call;
    shape_t s;              /* its tk and k count the added keys */
    int64_t deep, wide;     /* channels in whole tiles: of a sum (32), of the output (16) */
    int64_t keys, m;        /* keys in whole tiles (32); queries of a tile */
    int64_t slot_words;     /* [deep / 2, tk] of keys and [tk / 2, wide] of values */
} amx_job_t;

typedef struct {
    int64_t *region_in, *regions;
    uint32_t **blocks;
    const uint16_t **tokens; /* [tk] */
    uint32_t *slots, *columns, *rows; /* rows and columns of a query region, where they are put side by side */
    uint16_t *spare, *zero;           /* [tk, D] */
    uint16_t *q, *p;                  /* [T in whole tiles, deep], [16, keys] */
    float *bias, *s, *o;              /* [keys], [16, keys], [16, wide] */
} amx_scratch_t;

static amx_scratch_t amx_lay_out(pieces_t *pieces, const amx_job_t *j)
{
    const shape_t *s = &j->s;
    amx_scratch_t m;
    m.region_in = piece(pieces, s->slots * 8);
    m.regions = piece(pieces, j->call->topk * 8);
    m.blocks = piece(pieces, j->call->topk * 8);
    m.tokens = piece(pieces, s->tk * (int64_t)sizeof(uint16_t *));
    m.slots = piece(pieces, s->slots * j->slot_words * 4);
    m.columns = piece(pieces, j->deep / 2 * j->keys * 4);
    m.rows = piece(pieces, j->keys / 2 * j->wide * 4);
    m.spare = piece(pieces, s->tk * s->d * 2);
    m.zero = piece(pieces, s->d * 2);
    m.q = piece(pieces, ceil_div(s->t, TILE) * TILE * j->deep * 2);
    m.p = piece(pieces, TILE * j->keys * 2);
    m.bias = piece(pieces, j->keys * 4);
    m.s = piece(pieces, TILE * j->keys * 4);
    m.o = piece(pieces, TILE * j->wide * 4);
    return m;
}

/* The tokens of a key region as pointers to their channels: where they lie, or copied where channels lie apart. The
   map's padding, and the key that is added to an odd number, are `zero`. */
static void tokens_of(const map_t *map, const amx_job_t *j, amx_scratch_t *m, int64_t b, int64_t h, tile_t tile)
{
    const uint16_t **at = m->tokens;
    const shape_t *s = &j->s;
    int64_t y = tile.y, x = tile.x, real = tile.h * tile.w;
    for (int64_t i = 0; i < s->tk; i++) {
        at[i] = m->zero;
        if (i < real && y < tile.height && x < tile.width) {
            at[i] = (const uint16_t *)token_at(map, BFLOAT16, b, y, x, h, s->d);
            if (map->channel != 1) {
                for (int64_t d = 0; d < s->d; d++)
                    m->spare[i * s->d + d] = at[i][d * map->channel];
                at[i] = m->spare + i * s->d;
            }
        }
        if (++x == tile.x + tile.w) {
            x = tile.x;
            y++;
        }
    }
}

static uint32_t *amx_block_of(const amx_job_t *j, amx_scratch_t *m, int64_t b, int64_t h, int64_t region, int64_t slot)
{
    const shape_t *s = &j->s;
    if (s->kept)
        slot = region;
    uint32_t *keys = m->slots + slot * j->slot_words, *values = keys + j->deep / 2 * s->tk;
    if (m->region_in[slot] == region)
        return keys;
    m->region_in[slot] = region;
    const uint16_t **at = m->tokens;
    tile_t tile = key_tile(j->call, s, region);
    tokens_of(&j->call->k, j, m, b, h, tile);
    for (int64_t i = 0; i < s->tk; i += LANES)
        transpose((float *)keys + i, s->tk, (const float *const *)at + i, min_of(LANES, s->tk - i), s->d / 2);
    tokens_of(&j->call->v, j, m, b, h, tile);
    for (int64_t i = 0; i < s->tk; i += 2)
        for (int64_t d = 0; d < j->wide; d += 16) {
            __mmask16 real = s->d - d >= 16 ? 0xffff : (__mmask16)((1 << (s->d - d)) - 1);
            __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(real, at[i] + d));
            __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(real, at[i + 1] + d));
            _mm512_storeu_si512(values + i / 2 * j->wide + d, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
        }
    return keys;
}

/* n words side by side. */
INLINE void move_words(uint32_t *to, const uint32_t *from, int64_t n)
{
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
    if (i < n)
        copy_few((float *)to + i, (const float *)from + i, n - i);
}

/* S [M, 16 keys] of one column of tiles; `ld` words from one channel pair to the next. */
INLINE void score_column(float *to, int64_t keys, const uint32_t *columns, int64_t ld, int64_t deep, const int sums)
{
#define STEP(n)                                                                  \
    if (deep > n * DEEP) {                                                       \
        if (sums == C0) {                                                        \
            _tile_loadd(B0, columns + n * 16 * ld, ld * 4);                      \
            _tile_dpbf16ps(C0, A##n, B0);                                        \
        } else {                                                                 \
            _tile_loadd(B1, columns + n * 16 * ld, ld * 4);                      \
            _tile_dpbf16ps(C1, A##n, B1);                                        \
        }                                                                        \
    }
    if (sums == C0)
        _tile_zero(C0);
    else
        _tile_zero(C1);
    STEP(0)
    STEP(1)
    STEP(2)
    STEP(3)
#undef STEP
    if (sums == C0)
        _tile_stored(C0, to, keys * 4);
    else
        _tile_stored(C1, to, keys * 4);
}

/* 2^x for x <= 0 to 1e-4 of its value, which is finer than the weights are stored; see exp2_of. */
INLINE V coarse_exp2(V x)
{
    V magic = splat(12582912.0f), shifted = x + magic, f = x - (shifted - magic);
    V p = splat(5.51716685e-2f) * f + splat(2.42611125e-1f);
    p = p * f + splat(6.93260968e-1f);
    p = p * f + splat(9.99928057e-1f);
    __mmask16 large = _mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ);
    __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(large, _mm512_castps_si512(p), power));
}

/* Four rows of products s [4, keys], plus the bias where there is one, become weights p in bfloat16; gives 1 / their sums
   and, where `lse` is, the logs of the sums of n of them. */
INLINE void soften_four(uint16_t *p, const float *s, const float *bias, int64_t keys, float scale, float *factors,
                        float *lse, int64_t n)
{
    V top[4], sum[4], by = splat(scale * LOG2_E);
    UNROLL for (int i = 0; i < 4; i++)
    {
        top[i] = splat(-INFINITY);
        sum[i] = (V){0};
    }
    for (int64_t k = 0; k < keys; k += 16) {
        V hidden = bias ? load(bias + k) : (V){0};
        UNROLL for (int i = 0; i < 4; i++) top[i] = larger(top[i], load(s + i * keys + k) + hidden);
    }
    V tops = across_four(top, 1);
    spread_four(top, tops);
    for (int64_t k = 0; k < keys; k += 32) {
        V hidden = bias ? load(bias + k) : (V){0}, more = bias ? load(bias + k + 16) : (V){0};
        UNROLL for (int i = 0; i < 4; i++)
        {
            V low = coarse_exp2((load(s + i * keys + k) + hidden - top[i]) * by);
            V high = coarse_exp2((load(s + i * keys + k + 16) + more - top[i]) * by);
            sum[i] += low + high;
            _mm512_storeu_si512(p + i * keys + k, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
    V sums = across_four(sum, 0), inverse = splat(1.0f) / sums;
    memcpy(factors, &inverse, 16);
    if (lse) {
        float most[16], total[16];
        store(most, tops);
        store(total, sums);
        for (int64_t i = 0; i < min_of(n, 4); i++)
            lse[i] = most[i] * scale + logf(total[i]);
    }
}

static void amx_task(void *context, int64_t task, char *memory)
{
    const amx_job_t *j = context;
    const attention_t *c = j->call;
    const shape_t *s = &j->s;
    pieces_t pieces = {memory, 0};
    amx_scratch_t m = amx_lay_out(&pieces, j);
    tile_config_t config = {.palette = 1};
    for (int i = 0; i < TILES; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = i == B0 || i == B1 ? TILE : (uint8_t)j->m;
    }
    _tile_loadconfig(&config);

    int64_t b, h, first, end, direct_keys = s->tk % 16 == 0, direct_values = s->tk % 32 == 0;
    int64_t uneven = c->masked || s->k != j->keys || s->tk != c->kv_region_h * c->kv_region_w; /* some keys are hidden */
    task_range(c, s, task, &b, &h, &first, &end);
    const blocks_t held = {.call = c, .shape = s, .b = b, .h = h, .region_in = m.region_in};
    for (int64_t i = 0; i < s->slots; i++)
        m.region_in[i] = -1;
    /* What is read and belongs to nobody: channels and keys that fill tiles. */
    if (s->d < j->deep)
        memset(m.slots, 0, (size_t)(s->slots * j->slot_words) * 4);
    memset(m.columns, 0, (size_t)(j->deep / 2 * j->keys) * 4);
    memset(m.rows, 0, (size_t)(j->keys / 2 * j->wide) * 4);
    memset(m.zero, 0, (size_t)s->d * 2);
    memset(m.q, 0, (size_t)(ceil_div(s->t, TILE) * TILE * j->deep) * 2);
    for (int64_t r = first; r < end; r++) {
        for (int64_t slot = 0; slot < c->topk; slot++) {
            m.regions[slot] = route_of(c, b, h, r, slot);
            m.blocks[slot] = amx_block_of(j, &m, b, h, m.regions[slot], slot);
            const uint32_t *keys = m.blocks[slot], *values = keys + j->deep / 2 * s->tk;
            if (!direct_keys)
                for (int64_t d = 0; d < s->d / 2; d++)
                    move_words(m.columns + d * j->keys + slot * s->tk, keys + d * s->tk, s->tk);
            if (!direct_values)
                move_words(m.rows + slot * (s->tk / 2) * j->wide, values, s->tk / 2 * j->wide);
        }
        if (c->masked || (uneven && r == first)) {
            for (int64_t slot = 0; slot < c->topk; slot++) {
                tile_t at = key_tile(c, s, m.regions[slot]);
                for (int64_t i = 0; i < s->tk; i++) {
                    int64_t real = at.y + i / at.w < at.height && at.x + i % at.w < at.width;
                    m.bias[slot * s->tk + i] = i < at.h * at.w && (real || !c->masked) ? 0.0f : -INFINITY;
                }
            }
            for (int64_t i = s->k; i < j->keys; i++)
                m.bias[i] = -INFINITY;
        }
        tile_t at = query_tile(c, s, r);
        for (int64_t i = 0, y = at.y; y < at.y + at.h; y++)
            for (int64_t x = at.x; x < at.x + at.w; x++, i++) {
                uint16_t *to = m.q + i * j->deep;
                if (y >= at.height || x >= at.width) {
                    memset(to, 0, (size_t)s->d * 2);
                    continue;
                }
                const uint16_t *from = (const uint16_t *)token_at(&c->q, BFLOAT16, b, y, x, h, s->d);
                if (c->q.channel == 1)
                    for (int64_t d = 0; d < s->d; d += 8)
                        memcpy(to + d, from + d, 16);
                else
                    for (int64_t d = 0; d < s->d; d++)
                        to[d] = from[d * c->q.channel];
            }
        for (int64_t i = 0; i < s->t; i += j->m) {
            const uint16_t *q = m.q + i * j->deep;
            int64_t stride = j->deep * 2, n = min_of(j->m, s->t - i);
            if (r + 1 < end)
                fetch_next(&held, r + 1, i / j->m, ceil_div(s->t, j->m));
            _tile_loadd(A0, q, stride);
            if (j->deep > DEEP)
                _tile_loadd(A1, q + DEEP, stride);
            if (j->deep > 2 * DEEP)
                _tile_loadd(A2, q + 2 * DEEP, stride);
            if (j->deep > 3 * DEEP)
                _tile_loadd(A3, q + 3 * DEEP, stride);
            for (int64_t key = 0; key < j->keys; key += 2 * TILE) {
                const uint32_t *left = m.columns + key, *right = left + TILE;
                int64_t ld = j->keys;
                if (direct_keys) {
                    ld = s->tk;
                    left = m.blocks[key / s->tk] + key % s->tk;
                    int64_t next = min_of(key + TILE, s->k - TILE); /* a tile beyond K is hidden by its bias */
                    right = m.blocks[next / s->tk] + next % s->tk;
                }
                score_column(m.s + key, j->keys, left, ld, j->deep, C0);
                score_column(m.s + key + TILE, j->keys, right, ld, j->deep, C1);
            }
            float scale[TILE];
            float *lse = c->lse ? c->lse + ((b * c->heads + h) * s->regions + r) * s->t + i : NULL;
            for (int64_t u = 0; u < n; u += 4) {
                uint16_t *weights = m.p + u * j->keys;
                float *of_rows = lse ? lse + u : NULL;
                if (uneven)
                    soften_four(weights, m.s + u * j->keys, m.bias, j->keys, s->factor, scale + u, of_rows, n - u);
                else
                    soften_four(weights, m.s + u * j->keys, NULL, j->keys, s->factor, scale + u, of_rows, n - u);
            }
            for (int64_t d = 0; d < j->wide; d += 2 * TILE) {
                int64_t both = d + TILE < j->wide;
                _tile_zero(C0);
                _tile_zero(C1);
                for (int64_t key = 0; key < j->keys; key += DEEP) {
                    const uint32_t *from = m.rows + key / 2 * j->wide + d;
                    if (direct_values)
                        from = m.blocks[key / s->tk] + j->deep / 2 * s->tk + key % s->tk / 2 * j->wide + d;
                    _tile_loadd(A0, m.p + key, j->keys * 2);
                    _tile_loadd(B0, from, j->wide * 4);
                    _tile_dpbf16ps(C0, A0, B0);
                    if (both) {
                        _tile_loadd(B1, from + TILE, j->wide * 4);
                        _tile_dpbf16ps(C1, A0, B1);
                    }
                }
                _tile_stored(C0, m.o + d, j->wide * 4);
                if (both)
                    _tile_stored(C1, m.o + d + TILE, j->wide * 4);
            }
            write_rows(m.o, &c->out, c, b, h, at, s, i, n, scale);
        }
    }
    _tile_release();
}

extern const variant_t avx512_variant;

static int64_t amx_forward(const attention_t *c)
{
    if (c->dtype != BFLOAT16 || c->scale < 0 || c->region_h * c->region_w <= FEW_QUERIES)
        return avx512_variant.forward(c);
    amx_job_t j = {.call = c};
    j.deep = ceil_div(c->head_dim, DEEP) * DEEP;
    j.wide = ceil_div(c->head_dim, TILE) * TILE;
    int64_t tk = ceil_div(c->kv_region_h * c->kv_region_w, 2) * 2;
    j.slot_words = tk / 2 * (j.deep + j.wide);
    j.s = shape_of(c, j.slot_words / tk, 0);
    j.s.tk = tk;
    j.s.k = c->topk * tk;
    j.s.dp = j.wide; /* rows of the output */
    j.keys = ceil_div(j.s.k, DEEP) * DEEP;
    j.m = min_of(TILE, j.s.t);
    cut(&j.s, c->batch * c->heads, c->threads, c->threads > 1 ? 4 : 1);
    pieces_t nothing = {NULL, 0};
    amx_lay_out(&nothing, &j);
    return spread(amx_task, &j, c->batch * c->heads * j.s.parts, (size_t)nothing.used, c->threads);
}

/* --- linear layers ----------------------------------------------------------------------------------

   Rows through one linear layer or two, as in linear.h, on bfloat16: a block of 32 rows by 32 outputs is four sums, read
   by two tiles of rows and two of weights per 32 channels. Sums, biases, GELU and what is added are float32; hidden
   channels are rounded once, as PyTorch's would be. */

enum { PANEL = 16, BLOCK = 32, FEW_ROWS = 64 }; /* FEW_ROWS: up to which outputs are cut, see linear.h */
#define AMX_BYTES (384 << 10)

/* GELU as in linear.h, to 1.4e-5 of x: finer than the result is stored. */
INLINE V coarse_gelu(V x)
{
    static const float above[] = {3.380784969e-05f, 3.841027160e-03f, 2.705622243e-02f, 3.989451450e-01f};
    static const float below[] = {1.176788996e-03f, 2.366203384e-02f, 2.345231731e-01f, 1.0f};
    V held = larger(splat(-4.2f), x);
    held = -larger(splat(-4.2f), -held);
    V s = held * held, p = splat(above[0]), q = splat(below[0]);
    UNROLL for (int i = 1; i < (int)(sizeof above / sizeof *above); i++) p = p * s + splat(above[i]);
    UNROLL for (int i = 1; i < (int)(sizeof below / sizeof *below); i++) q = q * s + splat(below[i]);
    return x * (held * p * _mm512_rcp14_ps(q) + splat(0.5f));
}

/* y [rows, n] = [gelu of] x [rows in whole blocks, k] times panels, plus bias, plus add. */
typedef struct {
    const uint16_t *x, *w, *add;
    const float *bias;
    uint16_t *y;
    int64_t k, n, rows, gelu;
} amx_product_t;

/* A finished row of up to two vectors of sums becomes bfloat16. */
INLINE void finish_row(const amx_product_t *t, const float *sums, int64_t at, int64_t c, const int two)
{
    V low = load(sums), high = two ? load(sums + 16) : (V){0};
    if (t->bias) {
        low += load(t->bias + c);
        if (two)
            high += load(t->bias + c + 16);
    }
    if (t->gelu) {
        low = coarse_gelu(low);
        if (two)
            high = coarse_gelu(high);
    }
    if (t->add) {
        low += read_vector((const char *)(t->add + at), BFLOAT16);
        if (two)
            high += read_vector((const char *)(t->add + at + 16), BFLOAT16);
    }
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (two)
        _mm512_storeu_si512(t->y + at, both);
    else
        _mm256_storeu_si256((__m256i *)(t->y + at), _mm512_castsi512_si256(both));
}

static void amx_multiply(const amx_product_t *t, int64_t first, int64_t end)
{
    _Alignas(64) float sums[BLOCK * BLOCK];
    int64_t stride = t->k * 2;
    for (int64_t c = first; c < end; c += BLOCK) {
        const int two = c + BLOCK <= end;
        const uint16_t *w0 = t->w + c * t->k, *w1 = two ? w0 + PANEL * t->k : w0;
        for (int64_t i = 0; i < t->rows; i += BLOCK) {
            const uint16_t *x0 = t->x + i * t->k, *x1 = x0 + TILE * t->k;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t e = 0; e < t->k; e += DEEP) {
                _tile_loadd(6, w0 + e * PANEL, 64);
                _tile_loadd(4, x0 + e, stride);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, w1 + e * PANEL, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, x1 + e, stride);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, sums, BLOCK * 4);
            _tile_stored(1, sums + TILE, BLOCK * 4);
            _tile_stored(2, sums + TILE * BLOCK, BLOCK * 4);
            _tile_stored(3, sums + TILE * BLOCK + TILE, BLOCK * 4);
            int64_t n = min_of(BLOCK, t->rows - i);
            if (two)
                for (int64_t u = 0; u < n; u++)
                    finish_row(t, sums + u * BLOCK, (i + u) * t->n + c, c, 1);
            else
                for (int64_t u = 0; u < n; u++)
                    finish_row(t, sums + u * BLOCK, (i + u) * t->n + c, c, 0);
        }
    }
}

typedef struct {
    const linear_t *call;
    int64_t stretch, second; /* as in linear.h */
    uint16_t *hidden;
} amx_linear_t;

/* Rows as tiles read them: normed or copied, and zeros up to a whole block. Whole blocks are read where they lie. */
static const uint16_t *amx_rows(const linear_t *c, int64_t first, int64_t n, uint16_t *room, float *row)
{
    const uint16_t *x = (const uint16_t *)c->x + first * c->channels;
    if (!c->norm.channels && n % BLOCK == 0)
        return x;
    for (int64_t i = 0; i < n; i++)
        if (c->norm.channels)
            norm_row((char *)(room + i * c->channels), (const char *)(x + i * c->channels), row, &c->norm);
        else
            memcpy(room + i * c->channels, x + i * c->channels, (size_t)c->channels * 2);
    int64_t whole = ceil_div(n, BLOCK) * BLOCK;
    memset(room + n * c->channels, 0, (size_t)((whole - n) * c->channels) * 2);
    return room;
}

static amx_product_t amx_first(const linear_t *c, const uint16_t *x, uint16_t *y, int64_t rows)
{
    return (amx_product_t){x, c->first, NULL, c->first_bias, y, c->channels, c->hidden, rows, 1};
}

static amx_product_t amx_last(const linear_t *c, const uint16_t *x, int64_t first, int64_t rows)
{
    const uint16_t *add = c->add ? (const uint16_t *)c->add + first * c->last : NULL;
    uint16_t *y = (uint16_t *)c->y + first * c->last;
    if (c->second)
        return (amx_product_t){x, c->second, add, c->second_bias, y, c->hidden, c->last, rows, 0};
    return (amx_product_t){x, c->first, add, c->first_bias, y, c->channels, c->last, rows, 0};
}

static void amx_linear_task(void *context, int64_t task, char *memory)
{
    const amx_linear_t *j = context;
    const linear_t *c = j->call;
    tile_config_t config = {.palette = 1};
    for (int i = 0; i < TILES; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = TILE;
    }
    _tile_loadconfig(&config);
    int64_t by_outputs = c->rows <= FEW_ROWS * c->threads;
    int64_t first = by_outputs ? 0 : task * j->stretch, n = by_outputs ? c->rows : min_of(j->stretch, c->rows - first);
    int64_t whole = ceil_div(n, BLOCK) * BLOCK;
    float *row = (float *)memory;
    uint16_t *room = (uint16_t *)(row + ceil_div(c->channels, 16) * 16), *hidden = room + whole * c->channels;
    const uint16_t *x = j->second ? j->hidden : amx_rows(c, first, n, room, row);
    if (by_outputs) {
        amx_product_t t = c->second && !j->second ? amx_first(c, x, j->hidden, n) : amx_last(c, x, 0, n);
        amx_multiply(&t, task * j->stretch, min_of((task + 1) * j->stretch, t.n));
    } else {
        if (c->second) {
            amx_product_t widen = amx_first(c, x, hidden, n);
            amx_multiply(&widen, 0, c->hidden);
            memset(hidden + n * c->hidden, 0, (size_t)((whole - n) * c->hidden) * 2);
            x = hidden;
        }
        amx_product_t last = amx_last(c, x, first, n);
        amx_multiply(&last, 0, c->last);
    }
    _tile_release();
}

static int64_t amx_linear(const linear_t *c)
{
    if (c->dtype != BFLOAT16)
        return avx512_variant.linear(c);
    amx_linear_t j = {.call = c};
    int64_t head = ceil_div(c->channels, 16) * 64;
    if (c->rows <= FEW_ROWS * c->threads) {
        int64_t whole = ceil_div(c->rows, BLOCK) * BLOCK, wide = c->second ? c->hidden : c->last;
        void *hidden = NULL;
        if (c->second && posix_memalign(&hidden, 64, (size_t)(whole * c->hidden) * 2))
            return NO_MEMORY;
        j.hidden = hidden;
        if (c->second)
            memset(j.hidden + c->rows * c->hidden, 0, (size_t)((whole - c->rows) * c->hidden) * 2);
        int64_t failed = 0;
        for (j.second = 0; j.second <= (c->second != NULL) && !failed; j.second++, wide = c->last) {
            j.stretch = ceil_div(ceil_div(wide, BLOCK), 2 * c->threads) * BLOCK;
            failed = spread(amx_linear_task, &j, ceil_div(wide, j.stretch), (size_t)(head + whole * c->channels * 2),
                            c->threads);
        }
        free(hidden);
        return failed;
    }
    int64_t row = 2 * (c->channels + (c->second ? c->hidden : 0));
    int64_t blocks = ceil_div(c->rows, BLOCK), most = max_of(1, AMX_BYTES / (row * BLOCK));
    int64_t tasks = ceil_div(ceil_div(blocks, most), c->threads) * c->threads;
    j.stretch = ceil_div(blocks, tasks) * BLOCK;
    return spread(amx_linear_task, &j, ceil_div(c->rows, j.stretch), (size_t)(head + j.stretch * row), c->threads);
}

const variant_t amx_variant = {"amx", amx_forward, NULL, NULL, NULL, NULL, amx_linear};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
