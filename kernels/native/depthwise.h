/* Depthwise convolution of NHWC maps, odd side, stride 1, zeros around, with a bias and a map that is added.

   A task is a row of an image. For a vector of channels, DW_TOKENS tokens side by side are summed in registers: a weight
   that was loaded serves all of them, and no token is stored before it is finished. Those that see the border go one
   by one. */

/* n tokens of LANES channels from token x0 on; `inside`: all that they read is on the map. */
INLINE void depthwise_strip(const depthwise_t *d, int64_t b, int64_t y, int64_t x0, int64_t c, const int side,
                            const int dtype, const int inside, const int n)
{
    const int size = dtype == FLOAT32 ? 4 : 2, half = side / 2;
    V sum[DW_TOKENS], bias = d->bias ? load(d->bias + c) : (V){0};
    UNROLL for (int i = 0; i < n; i++) sum[i] = bias;
    for (int ky = 0; ky < side; ky++) {
        int64_t row = y + ky - half;
        if (row < 0 || row >= d->height)
            continue;
        const char *at = d->x.data + size * (b * d->x.image + row * d->x.row + c);
        for (int kx = 0; kx < side; kx++) {
            V weight = load(d->weight + (ky * side + kx) * d->channels + c);
            int64_t x = x0 + kx - half;
            if (!inside && (x < 0 || x >= d->width)) /* n is 1 */
                continue;
            UNROLL for (int i = 0; i < n; i++)
                sum[i] += weight * read_vector(at + size * (x + i) * d->x.token, dtype);
        }
    }
    UNROLL for (int i = 0; i < n; i++)
    {
        V value = sum[i];
        int64_t x = x0 + i;
        if (d->add.data)
            value += read_vector(d->add.data + size * (b * d->add.image + y * d->add.row + x * d->add.token + c), dtype);
        write_vector(d->out.data + size * (b * d->out.image + y * d->out.row + x * d->out.token + c), value, dtype);
    }
}

INLINE void depthwise_row(const depthwise_t *d, int64_t b, int64_t y, const int side, const int dtype)
{
    const int half = side / 2;
    for (int64_t c = 0; c < d->channels; c += LANES) {
        int64_t x = 0;
        for (; x < min_of(half, d->width); x++)
            depthwise_strip(d, b, y, x, c, side, dtype, 0, 1);
        for (; x + DW_TOKENS + half <= d->width; x += DW_TOKENS)
            depthwise_strip(d, b, y, x, c, side, dtype, 1, DW_TOKENS);
        for (; x + DW_REST + half <= d->width; x += DW_REST)
            depthwise_strip(d, b, y, x, c, side, dtype, 1, DW_REST);
        for (; x < d->width; x++)
            depthwise_strip(d, b, y, x, c, side, dtype, 0, 1);
    }
}

static void depthwise_task(void *context, int64_t task, char *memory)
{
    const depthwise_t *d = context;
    int64_t b = task / d->height, y = task % d->height;
    if (d->dtype == FLOAT32)
        depthwise_row(d, b, y, (int)d->side, FLOAT32);
    else if (d->dtype == BFLOAT16)
        depthwise_row(d, b, y, (int)d->side, BFLOAT16);
    else
        depthwise_row(d, b, y, (int)d->side, FLOAT16);
    (void)memory;
}

static int64_t depthwise(const depthwise_t *d)
{
    return spread(depthwise_task, (void *)d, d->batch * d->height, 0, d->threads);
}
