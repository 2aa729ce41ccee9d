/* Rows through one linear layer or two, in float32, with what stands around them in a block: LayerNorm before, GELU
   between, a map added after. A task is a stretch of rows that stays in the L2 cache from the first product to the last,
   so that hidden channels never go to memory.

   A register tile is TILE_ROWS rows by TILE_VECTORS vectors of outputs: per channel one load of each vector and one
   broadcast of each row serve all its products. Few rows are cut by outputs instead: every thread then reads its share
   of the weights only, which are most of what is read. */

#define PANEL 16
#define TILE_VECTORS 2
#if LANES == 16 || defined(__aarch64__)
#define TILE_ROWS 14
#else
#define TILE_ROWS 6
#endif
/* What a task may hold of rows and hidden channels: a fifth of a common L2 cache, beside the panels that pass. */
#define LINEAR_BYTES (384 << 10)
/* Rows per thread up to which outputs are cut. */
#define FEW_ROWS 32

/* The standard normal distribution up to x, 1/2 + x P(x^2) / Q(x^2): minimax on [-5.4, 5.4], error 9e-8; beyond, the
   value at the end. */
INLINE V below_of(V x)
{
    static const float above[] = {6.757465148e-06f, 3.728287892e-04f, 5.904695589e-03f, 5.487713453e-02f,
                                  3.989417176e-01f};
    static const float below[] = {5.629772069e-07f, 1.337741340e-04f, 3.045153477e-03f, 4.051961038e-02f,
                                  3.042142287e-01f, 1.0f};
    V held = larger(splat(-5.4f), x);
    held = -larger(splat(-5.4f), -held);
    V s = held * held, p = splat(above[0]), q = splat(below[0]);
    UNROLL for (int i = 1; i < (int)(sizeof above / sizeof *above); i++) p = p * s + splat(above[i]);
    UNROLL for (int i = 1; i < (int)(sizeof below / sizeof *below); i++) q = q * s + splat(below[i]);
    return held * p * inverse_of(q) + splat(0.5f);
}

INLINE V gelu_of(V x) { return x * below_of(x); }

/* Rows of one product: y [rows, n] = x [rows, k] times panels, plus bias and, where it is there, add. */
typedef struct {
    const float *x, *w, *bias, *add;
    float *y;
    int64_t k, n, rows, gelu;
} product_t;

/* to[mr, nv vectors] from row i and output c on; `next` is read soon. */
INLINE void linear_tile(const product_t *t, int64_t i, int64_t c, const char *next, const int mr, const int nv)
{
    const int64_t k = t->k, apart = LANES == PANEL ? k * PANEL : LANES;
    const float *w0 = t->w + c / PANEL * PANEL * k + c % PANEL, *w1 = w0 + apart;
    /* Rows 0 to 2, 3 to 5 and so on, from one pointer each: more would not fit into the registers. */
    const float *x0 = t->x + i * k, *x3 = x0 + 3 * k, *x6 = x0 + 6 * k, *x9 = x0 + 9 * k, *x12 = x0 + 12 * k;
    V sum[TILE_ROWS][TILE_VECTORS];
    UNROLL for (int v = 0; v < nv; v++)
    {
        V bias = t->bias ? load(t->bias + c + v * LANES) : (V){0};
        UNROLL for (int u = 0; u < mr; u++) sum[u][v] = bias;
    }
    for (int64_t e = 0; e < k; e++, x0++, x3++, x6++, x9++, x12++, w0 += PANEL, w1 += PANEL) {
        V column[TILE_VECTORS];
        column[0] = load(w0);
        if (nv > 1)
            column[1] = load(w1);
        UNROLL for (int u = 0; u < mr; u++)
        {
            const float *x = u < 3 ? x0 : u < 6 ? x3 : u < 9 ? x6 : u < 12 ? x9 : x12;
            V factor = splat(x[u % 3 * k]);
            UNROLL for (int v = 0; v < nv; v++) sum[u][v] += factor * column[v];
        }
        __builtin_prefetch(next, 0, 2);
        next += 64;
    }
    UNROLL for (int u = 0; u < mr; u++)
        UNROLL for (int v = 0; v < nv; v++)
        {
            int64_t at = (i + u) * t->n + c + v * LANES;
            store(t->y + at, t->add ? sum[u][v] + load(t->add + at) : sum[u][v]);
        }
}

/* Rows 0 to t->rows, outputs first to end, both of whole vectors. */
static void multiply(const product_t *t, int64_t first, int64_t end)
{
    for (int64_t c = first; c < end; c += TILE_VECTORS * LANES) {
        const int two = c + 2 * LANES <= end;
        const char *next = (const char *)(t->w + (c + TILE_VECTORS * LANES) / PANEL * PANEL * t->k);
        for (int64_t i = 0, n; i < t->rows; i += n) {
            const char *ahead = next + (i / TILE_ROWS & 1) * t->k * 64; /* the next pair of panels, by two tiles */
#define TILE(m)                                        \
    {                                                  \
        n = m;                                         \
        if (two)                                       \
            linear_tile(t, i, c, ahead, m, 2);         \
        else                                           \
            linear_tile(t, i, c, ahead, m, 1);         \
    }
            int64_t left = t->rows - i;
            if (left >= TILE_ROWS)
                TILE(TILE_ROWS)
#if TILE_ROWS > 7
            else if (left >= 7)
                TILE(7)
#endif
            else if (left >= 4)
                TILE(4)
            else if (left >= 2)
                TILE(2)
            else
                TILE(1)
#undef TILE
            for (int64_t u = i; t->gelu && u < i + n; u++)
                for (int v = 0; v < 1 + two; v++) {
                    float *at = t->y + u * t->n + c + v * LANES;
                    store(at, gelu_of(load(at)));
                }
        }
    }
}

typedef struct {
    const linear_t *call;
    int64_t stretch; /* rows, or outputs, of a task */
    float *hidden;   /* where outputs are cut: [rows, hidden] */
    int second;
} linear_job_t;

/* Rows first to first + n as the first product reads them. */
static const float *normed_rows(const linear_t *c, int64_t first, int64_t n, float *room)
{
    const char *x = c->x + first * c->channels * 4;
    if (!c->norm.channels)
        return (const float *)x;
    for (int64_t i = 0; i < n; i++)
        norm_row((char *)(room + i * c->channels), x + i * c->channels * 4, NULL, &c->norm);
    return room;
}

static product_t first_product(const linear_t *c, const float *x, float *y, int64_t rows)
{
    return (product_t){x, c->first, c->first_bias, NULL, y, c->channels, c->hidden, rows, c->second != NULL};
}

static product_t last_product(const linear_t *c, const float *x, int64_t first, int64_t rows)
{
    const float *add = c->add ? (const float *)c->add + first * c->last : NULL;
    float *y = (float *)c->y + first * c->last;
    if (c->second)
        return (product_t){x, c->second, c->second_bias, add, y, c->hidden, c->last, rows, 0};
    return (product_t){x, c->first, c->first_bias, add, y, c->channels, c->last, rows, 0};
}

static void linear_task(void *context, int64_t task, char *memory)
{
    const linear_job_t *j = context;
    const linear_t *c = j->call;
    int64_t first = task * j->stretch, n = min_of(j->stretch, c->rows - first);
    float *room = (float *)memory, *hidden = room + (c->norm.channels ? j->stretch * c->channels : 0);
    const float *x = normed_rows(c, first, n, room);
    if (c->second) {
        product_t widen = first_product(c, x, hidden, n);
        multiply(&widen, 0, c->hidden);
        x = hidden;
    }
    product_t last = last_product(c, x, first, n);
    multiply(&last, 0, c->last);
}

static void outputs_task(void *context, int64_t task, char *memory)
{
    const linear_job_t *j = context;
    const linear_t *c = j->call;
    int64_t first = task * j->stretch;
    if (j->second) {
        product_t last = last_product(c, j->hidden, 0, c->rows);
        multiply(&last, first, min_of(first + j->stretch, c->last));
        return;
    }
    const float *x = normed_rows(c, 0, c->rows, (float *)memory);
    product_t only = c->second ? first_product(c, x, j->hidden, c->rows) : last_product(c, x, 0, c->rows);
    multiply(&only, first, min_of(first + j->stretch, only.n));
}

/* Outputs of a task: two tasks per thread. */
static int64_t cut_outputs(int64_t outputs, int64_t threads)
{
    int64_t wide = TILE_VECTORS * LANES;
    return ceil_div(ceil_div(outputs, wide), 2 * threads) * wide;
}

static int64_t few_rows(const linear_t *c)
{
    linear_job_t j = {.call = c};
    void *hidden = NULL;
    if (c->second && posix_memalign(&hidden, 64, (size_t)(c->rows * c->hidden) * 4))
        return NO_MEMORY;
    j.hidden = hidden;
    size_t room = c->norm.channels ? (size_t)(c->rows * c->channels) * 4 : 0;
    j.stretch = cut_outputs(c->second ? c->hidden : c->last, c->threads);
    int64_t failed = spread(outputs_task, &j, ceil_div(c->second ? c->hidden : c->last, j.stretch), room, c->threads);
    if (c->second && !failed) {
        j.second = 1;
        j.stretch = cut_outputs(c->last, c->threads);
        failed = spread(outputs_task, &j, ceil_div(c->last, j.stretch), 0, c->threads);
    }
    free(hidden);
    return failed;
}

static int64_t linear(const linear_t *c)
{
    if (c->rows <= FEW_ROWS * c->threads)
        return few_rows(c);
    linear_job_t j = {.call = c};
    int64_t row = 4 * ((c->norm.channels ? c->channels : 0) + (c->second ? c->hidden : 0));
    int64_t tiles = ceil_div(c->rows, TILE_ROWS);
    int64_t most = max_of(1, LINEAR_BYTES / ((row + 4 * c->channels) * TILE_ROWS));
    int64_t tasks = ceil_div(ceil_div(tiles, most), c->threads) * c->threads;
    j.stretch = ceil_div(tiles, tasks) * TILE_ROWS;
    return spread(linear_task, &j, ceil_div(c->rows, j.stretch), (size_t)(j.stretch * row), c->threads);
}
