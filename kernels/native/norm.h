/* LayerNorm of tokens: a row is read into the L1 cache as floats once, then summed, spread and written from there. */

/* Rows of a task: 16 of 64 channels are 4 KiB, enough to be worth a turn. */
#define NORM_ROWS 16

/* One token from x to y; `row` has room for its channels as floats. */
static void norm_row(char *to, const char *from, float *row, const norm_t *n)
{
    int64_t c = n->channels, whole = c / LANES * LANES;
    const float *x = row;
    float *y = row;
    if (n->dtype == FLOAT32)
        y = (float *)to;
    if (n->dtype == FLOAT32 && !n->shift)
        x = (const float *)from;
    else
        read_row(row, from, n->dtype, 1, c, 1.0f);
    V sums = {0}, squares = {0};
    float sum = 0, square = 0;
    if (n->shift)
        for (int64_t i = 0; i < c; i++)
            row[i] += n->shift[i];
    for (int64_t i = 0; i < whole; i += LANES)
        sums += load(x + i);
    for (int64_t i = whole; i < c; i++)
        sum += x[i];
    float mean = (sum_of(sums) + sum) / (float)c;
    /* Squares of differences, not a difference of squares: a mean far from zero costs no digits. */
    for (int64_t i = 0; i < whole; i += LANES) {
        V d = load(x + i) - splat(mean);
        squares += d * d;
    }
    for (int64_t i = whole; i < c; i++)
        square += (x[i] - mean) * (x[i] - mean);
    float by = 1.0f / sqrtf((sum_of(squares) + square) / (float)c + (float)n->eps);
    for (int64_t i = 0; i < whole; i += LANES) {
        V value = (load(x + i) - splat(mean)) * splat(by);
        if (n->weight)
            value *= load(n->weight + i);
        if (n->bias)
            value += load(n->bias + i);
        store(y + i, value);
    }
    for (int64_t i = whole; i < c; i++)
        y[i] = (x[i] - mean) * by * (n->weight ? n->weight[i] : 1.0f) + (n->bias ? n->bias[i] : 0.0f);
    if (y == row)
        write_row(to, row, n->dtype, 1, c, 1.0f);
}

static void norm_task(void *context, int64_t task, char *memory)
{
    const norm_t *n = context;
    int64_t bytes = n->channels * bytes_of(n->dtype);
    int64_t first = task * NORM_ROWS, end = min_of(first + NORM_ROWS, n->rows);
    for (int64_t r = first; r < end; r++)
        norm_row(n->y + r * bytes, n->x + r * bytes, (float *)memory, n);
}

static int64_t norm(const norm_t *n)
{
    return spread(norm_task, (void *)n, ceil_div(n->rows, NORM_ROWS), (size_t)n->channels * 4, n->threads);
}
