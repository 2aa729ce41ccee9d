/* What a training step needs around attention, in float32: an MLP that keeps its hidden channels, the way back through
   linear layers, GELU and LayerNorm, the gradients of a depthwise convolution's weight, and matrices in panels.

   As forward (linear.h), a task takes a stretch of rows from the gradient of the last layer to that of the norm's input
   while they are in the L2 cache. Gradients of weights are products over all rows, which PyTorch multiplies; what they
   read is written here: what GELU gave, the gradient of what it got, what the norm gave.

   Sums over rows (gradients of biases and of the norm's vectors) are taken per task and added up in the order of the
   tasks, so that the same number of threads gives the same bits. */

/* --- matrices in panels ----------------------------------------------------------------------------- */

static void panel_task(void *context, int64_t task, char *memory)
{
    const panels_t *p = context;
    if (p->by_columns) {
        const float *from = p->from + task * PANEL;
        float *to = p->to + task * p->rows * PANEL;
        for (int64_t r = 0; r < p->rows; r++, from += p->cols, to += PANEL)
            for (int i = 0; i < PANEL; i += LANES)
                store(to + i, load(from + i));
        return;
    }
    const float *rows[PANEL];
    for (int i = 0; i < PANEL; i++)
        rows[i] = p->from + (task * PANEL + i) * p->cols;
    transpose(p->to + task * PANEL * p->cols, PANEL, rows, PANEL, p->cols);
    (void)memory;
}

static int64_t panels(const panels_t *p)
{
    return spread(panel_task, (void *)p, (p->by_columns ? p->cols : p->rows) / PANEL, 0, p->threads);
}

/* --- sums over rows --------------------------------------------------------------------------------- */

/* sums[n] += the rows of x [rows, n]. */
static void add_rows(float *sums, const float *x, int64_t rows, int64_t n)
{
    for (int64_t i = 0; i < n; i += LANES) {
        V sum = load(sums + i);
        for (int64_t r = 0; r < rows; r++)
            sum += load(x + r * n + i);
        store(sums + i, sum);
    }
}

/* --- forward ---------------------------------------------------------------------------------------- */

typedef struct {
    const kept_mlp_t *call;
    int64_t stretch;
} kept_job_t;

static void kept_mlp_task(void *context, int64_t task, char *memory)
{
    const kept_job_t *j = context;
    const linear_t *c = &j->call->linear;
    int64_t first = task * j->stretch, n = min_of(j->stretch, c->rows - first);
    float *room = (float *)memory, *activated = room + j->stretch * c->channels;
    float *kept = j->call->kept + first * c->hidden;
    product_t widen = first_product(c, normed_rows(c, first, n, room), kept, n);
    widen.gelu = 0;
    multiply(&widen, 0, c->hidden);
    for (int64_t i = 0; i < n * c->hidden; i += LANES)
        store(activated + i, gelu_of(load(kept + i)));
    product_t narrow = last_product(c, activated, first, n);
    multiply(&narrow, 0, c->last);
}

/* Rows of a task that hold `row` bytes each: whole register tiles, as many tasks for every thread. */
static int64_t stretch_of(int64_t rows, int64_t row, int64_t threads)
{
    int64_t tiles = ceil_div(rows, TILE_ROWS), most = max_of(1, LINEAR_BYTES / (row * TILE_ROWS));
    int64_t tasks = ceil_div(ceil_div(tiles, most), threads) * threads;
    return ceil_div(tiles, tasks) * TILE_ROWS;
}

static int64_t kept_mlp(const kept_mlp_t *call)
{
    const linear_t *c = &call->linear;
    kept_job_t j = {call, stretch_of(c->rows, 4 * (2 * c->channels + 2 * c->hidden), c->threads)};
    size_t room = (size_t)(j.stretch * (c->channels + c->hidden)) * 4;
    return spread(kept_mlp_task, &j, ceil_div(c->rows, j.stretch), room, c->threads);
}

/* --- backward --------------------------------------------------------------------------------------- */

typedef struct {
    const linear_grad_t *call;
    int64_t stretch, tasks, width; /* width: numbers of `sums` */
    float *sums;                   /* [tasks, width] */
} linear_grad_job_t;

/* n numbers: activated = gelu(kept), and grad times the derivative of GELU, P(x) + x p(x) with the standard normal
   distribution P and its density p. */
static void gelu_grads(float *grad, float *activated, const float *kept, int64_t n)
{
    for (int64_t i = 0; i < n; i += LANES) {
        V x = load(kept + i), below = below_of(x);
        V density = splat(0.398942280f) * exp2_of(x * x * splat(-0.5f * LOG2_E));
        store(activated + i, x * below);
        store(grad + i, load(grad + i) * (below + x * density));
    }
}

/* One token back through LayerNorm; dy is its gradient, gain and shift grow by theirs. */
static void norm_row_grad(const linear_grad_t *c, int64_t row, const float *dy, float *of_gain, float *of_shift)
{
    const int64_t n = c->channels, at = row * n;
    const float *x = c->x + at;
    const float by = 1.0f / (float)n;
    V sums = {0}, squares = {0}, flat = {0}, along = {0};
    for (int64_t i = 0; i < n; i += LANES)
        sums += load(x + i);
    V mean = splat(sum_of(sums) * by);
    for (int64_t i = 0; i < n; i += LANES) {
        V d = load(x + i) - mean;
        squares += d * d;
    }
    V scale = splat(1.0f / sqrtf(sum_of(squares) * by + (float)c->eps));
    for (int64_t i = 0; i < n; i += LANES) {
        V normed = (load(x + i) - mean) * scale, grad = load(dy + i);
        store(of_gain + i, load(of_gain + i) + grad * normed);
        store(of_shift + i, load(of_shift + i) + grad);
        V gain = c->gain ? load(c->gain + i) : splat(1.0f);
        store(c->y + at + i, c->shift ? normed * gain + load(c->shift + i) : normed * gain);
        grad *= gain;
        flat += grad;
        along += grad * normed;
    }
    V m = splat(sum_of(flat) * by), s = splat(sum_of(along) * by);
    for (int64_t i = 0; i < n; i += LANES) {
        V normed = (load(x + i) - mean) * scale, grad = load(dy + i);
        if (c->gain)
            grad *= load(c->gain + i);
        V dx = (grad - m - normed * s) * scale;
        store(c->dx + at + i, c->add ? dx + load(c->add + at + i) : dx);
    }
}

static void linear_grad_task(void *context, int64_t task, char *memory)
{
    const linear_grad_job_t *j = context;
    const linear_grad_t *c = j->call;
    int64_t first = task * j->stretch, n = min_of(j->stretch, c->rows - first), k = c->outputs;
    float *sums = j->sums + task * j->width;
    memset(sums, 0, (size_t)j->width * 4);
    const float *grad = c->grad + first * k;
    add_rows(sums, grad, n, k);
    sums += k;
    if (c->hidden) {
        float *dhidden = c->dhidden + first * c->hidden;
        product_t last = {grad, c->last, NULL, NULL, dhidden, k, c->hidden, n, 0};
        multiply(&last, 0, c->hidden);
        gelu_grads(dhidden, c->activated + first * c->hidden, c->kept + first * c->hidden, n * c->hidden);
        k = c->hidden;
        grad = dhidden;
        add_rows(sums, grad, n, k);
        sums += k;
    }
    const float *beside = c->beside ? c->beside + first * c->channels : NULL;
    float *dy = c->x ? (float *)memory : c->dx + first * c->channels;
    product_t only = {grad, c->first, NULL, beside, dy, k, c->channels, n, 0};
    multiply(&only, 0, c->channels);
    if (c->x)
        for (int64_t i = 0; i < n; i++)
            norm_row_grad(c, first + i, dy + i * c->channels, sums, sums + c->channels);
}

/* Numbers [first, first + n) of the sums of all tasks. */
typedef struct {
    const float *parts;
    float *sums;
    int64_t count, width;
} total_t;

enum { TOTAL_NUMBERS = 256 };

static void total_task(void *context, int64_t task, char *memory)
{
    const total_t *t = context;
    int64_t end = min_of((task + 1) * TOTAL_NUMBERS, t->width);
    for (int64_t i = task * TOTAL_NUMBERS; i < end; i += LANES) {
        V sum = load(t->parts + i);
        for (int64_t part = 1; part < t->count; part++)
            sum += load(t->parts + part * t->width + i);
        store(t->sums + i, sum);
    }
    (void)memory;
}

/* sums [width] = the sum of parts [count, width], in order. */
static int64_t total(float *sums, const float *parts, int64_t count, int64_t width, int64_t threads)
{
    total_t t = {parts, sums, count, width};
    return spread(total_task, &t, ceil_div(width, TOTAL_NUMBERS), 0, threads);
}

static int64_t linear_grad(const linear_grad_t *c)
{
    linear_grad_job_t j = {.call = c, .width = c->outputs + c->hidden + (c->x ? 2 * c->channels : 0)};
    j.stretch = stretch_of(c->rows, 4 * (c->outputs + 3 * c->hidden + 4 * c->channels), c->threads);
    j.tasks = ceil_div(c->rows, j.stretch);
    void *parts;
    if (posix_memalign(&parts, 64, (size_t)(j.tasks * j.width) * 4))
        return NO_MEMORY;
    j.sums = parts;
    size_t room = c->x ? (size_t)(j.stretch * c->channels) * 4 : 0;
    int64_t failed = spread(linear_grad_task, &j, j.tasks, room, c->threads);
    if (!failed)
        failed = total(c->sums, j.sums, j.tasks, j.width, c->threads);
    free(parts);
    return failed;
}

/* --- weights of depthwise convolutions -------------------------------------------------------------- */

typedef struct {
    const depthwise_grad_t *call;
    int64_t stretch; /* rows of images of a task */
    float *sums;     /* [tasks, side * side + 1, C] */
} depthwise_grad_job_t;

/* Most places of a filter in a row. */
enum { MOST_SIDE = 9 };

/* What token `at` of a row says; `inside`: all that the filter reads is on the map. */
INLINE void depthwise_token_grad(const depthwise_grad_t *d, const float *x, const float *grad, int64_t at,
                                 V (*sum)[DW_VECTORS], V *total, const int side, const int nv, const int inside)
{
    UNROLL for (int v = 0; v < nv; v++)
    {
        V g = load(grad + at * d->grad.token + v * LANES);
        total[v] += g;
        UNROLL for (int kx = 0; kx < side; kx++)
        {
            int64_t from = at + kx - side / 2;
            if (inside || (from >= 0 && from < d->width))
                sum[kx][v] += g * load(x + from * d->x.token + v * LANES);
        }
    }
}

/* What row y of an image says to row ky of the filter, and to the bias where `bias` is there. */
INLINE void depthwise_row_grad(const depthwise_grad_t *d, const float *x, const float *grad, float *sums, float *bias,
                               const int side, const int nv)
{
    const int half = side / 2;
    V sum[MOST_SIDE][DW_VECTORS], total[DW_VECTORS];
    UNROLL for (int v = 0; v < nv; v++)
    {
        total[v] = (V){0};
        UNROLL for (int kx = 0; kx < side; kx++) sum[kx][v] = (V){0};
    }
    int64_t left = min_of(half, d->width), right = max_of(left, d->width - half);
    for (int64_t at = 0; at < left; at++)
        depthwise_token_grad(d, x, grad, at, sum, total, side, nv, 0);
    for (int64_t at = left; at < right; at++)
        depthwise_token_grad(d, x, grad, at, sum, total, side, nv, 1);
    for (int64_t at = right; at < d->width; at++)
        depthwise_token_grad(d, x, grad, at, sum, total, side, nv, 0);
    UNROLL for (int v = 0; v < nv; v++)
    {
        UNROLL for (int kx = 0; kx < side; kx++)
        {
            float *to = sums + kx * d->channels + v * LANES;
            store(to, load(to) + sum[kx][v]);
        }
        if (bias)
            store(bias + v * LANES, load(bias + v * LANES) + total[v]);
    }
}

INLINE void depthwise_image_row_grad(const depthwise_grad_t *d, int64_t row, float *sums, const int side)
{
    int64_t b = row / d->height, y = row % d->height, half = side / 2;
    const float *grad = (const float *)d->grad.data + b * d->grad.image + y * d->grad.row;
    for (int64_t ky = 0; ky < side; ky++) {
        if (y + ky < half || y + ky - half >= d->height)
            continue;
        const float *x = (const float *)d->x.data + b * d->x.image + (y + ky - half) * d->x.row;
        float *to = sums + ky * side * d->channels;
        float *bias = ky == half ? sums + side * side * d->channels : NULL;
        int64_t c = 0;
        for (; c + DW_VECTORS * LANES <= d->channels; c += DW_VECTORS * LANES)
            depthwise_row_grad(d, x + c, grad + c, to + c, bias ? bias + c : NULL, side, DW_VECTORS);
#if DW_VECTORS > 1
        for (; c < d->channels; c += LANES)
            depthwise_row_grad(d, x + c, grad + c, to + c, bias ? bias + c : NULL, side, 1);
#endif
    }
}

static void depthwise_grad_task(void *context, int64_t task, char *memory)
{
    const depthwise_grad_job_t *j = context;
    const depthwise_grad_t *d = j->call;
    int64_t width = (d->side * d->side + 1) * d->channels;
    float *sums = j->sums + task * width;
    memset(sums, 0, (size_t)width * 4);
    int64_t end = min_of((task + 1) * j->stretch, d->batch * d->height);
    for (int64_t row = task * j->stretch; row < end; row++)
        if (d->side == 3)
            depthwise_image_row_grad(d, row, sums, 3);
        else if (d->side == 5)
            depthwise_image_row_grad(d, row, sums, 5);
        else
            depthwise_image_row_grad(d, row, sums, (int)d->side);
    (void)memory;
}

static int64_t depthwise_grad(const depthwise_grad_t *d)
{
    int64_t rows = d->batch * d->height, width = (d->side * d->side + 1) * d->channels;
    depthwise_grad_job_t j = {.call = d, .stretch = ceil_div(rows, 4 * d->threads)};
    int64_t tasks = ceil_div(rows, j.stretch);
    void *parts;
    if (posix_memalign(&parts, 64, (size_t)(tasks * width) * 4))
        return NO_MEMORY;
    j.sums = parts;
    int64_t failed = spread(depthwise_grad_task, &j, tasks, 0, d->threads);
    if (!failed)
        failed = total(d->sums, j.sums, tasks, width, d->threads);
    free(parts);
    return failed;
}
