/* LayerNorm of tokens: a row is read into the L1 cache as floats once, then summed, spread and written from there. */

static void norm_task(void *context, int64_t task, char *memory)
{
    const norm_t *n = context;
    float *row = (float *)memory;
    int64_t c = n->channels, whole = c / LANES * LANES, bytes = c * bytes_of(n->dtype);
    int64_t first = task * NORM_ROWS, end = min_of(first + NORM_ROWS, n->rows);
    for (int64_t r = first; r < end; r++) {
        read_row(row, n->x + r * bytes, n->dtype, 1, c, 1.0f);
        V sums = {0}, squares = {0};
        float sum = 0, square = 0;
        for (int64_t i = 0; i < whole; i += LANES) {
            V x = load(row + i);
            if (n->shift) {
                x += load(n->shift + i);
                store(row + i, x);
            }
            sums += x;
        }
        for (int64_t i = whole; i < c; i++) {
            row[i] += n->shift ? n->shift[i] : 0.0f;
            sum += row[i];
        }
        float mean = (sum_of(sums) + sum) / (float)c;
        /* Squares of differences, not a difference of squares: a mean far from zero costs no digits. */
        for (int64_t i = 0; i < whole; i += LANES) {
            V d = load(row + i) - splat(mean);
            squares += d * d;
        }
        for (int64_t i = whole; i < c; i++)
            square += (row[i] - mean) * (row[i] - mean);
        float by = 1.0f / sqrtf((sum_of(squares) + square) / (float)c + (float)n->eps);
        for (int64_t i = 0; i < whole; i += LANES) {
            V y = (load(row + i) - splat(mean)) * splat(by);
            if (n->weight)
                y *= load(n->weight + i);
            if (n->bias)
                y += load(n->bias + i);
            store(row + i, y);
        }
        for (int64_t i = whole; i < c; i++)
            row[i] = (row[i] - mean) * by * (n->weight ? n->weight[i] : 1.0f) + (n->bias ? n->bias[i] : 0.0f);
        write_row(n->y + r * bytes, row, n->dtype, 1, c, 1.0f);
    }
}

static int64_t norm(const norm_t *n)
{
    return spread(norm_task, (void *)n, ceil_div(n->rows, NORM_ROWS), (size_t)n->channels * 4, n->threads);
}
