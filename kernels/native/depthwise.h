/* Depthwise convolution of NHWC maps, odd side, stride 1, zeros around, with a bias and a map that is added.

   A task is a row of an image. For a few vectors of channels, DW_TOKENS tokens side by side are summed in registers: a
   weight that was loaded serves all of them, and no token is stored before it is finished. */

/* n <= DW_TOKENS tokens of nv vectors of channels from token x0 on; `inside`: all that they read is on the map. */
INLINE void depthwise_strip(const depthwise_t *d, int64_t b, int64_t y, int64_t x0, int64_t c, const int side,
                            const int dtype, const int inside, const int64_t n, const int nv)
{
    const int size = dtype == FLOAT32 ? 4 : 2, half = side / 2;
    V sum[DW_TOKENS][DW_VECTORS];
    UNROLL for (int v = 0; v < nv; v++)
    {
        V bias = d->bias ? load(d->bias + c + v * LANES) : (V){0};
        UNROLL for (int i = 0; i < DW_TOKENS; i++) sum[i][v] = bias;
    }
    for (int ky = 0; ky < side; ky++) {
        int64_t row = y + ky - half;
        if (row < 0 || row >= d->height)
            continue;
        const char *at = d->x.data + size * (b * d->x.image + row * d->x.row + c);
        for (int kx = 0; kx < side; kx++) {
            V weight[DW_VECTORS];
            UNROLL for (int v = 0; v < nv; v++)
                weight[v] = load(d->weight + (ky * side + kx) * d->channels + c + v * LANES);
            UNROLL for (int i = 0; i < DW_TOKENS; i++)
            {
                int64_t x = x0 + i + kx - half;
                if (!inside && (i >= n || x < 0 || x >= d->width))
                    continue;
                UNROLL for (int v = 0; v < nv; v++)
                    sum[i][v] += weight[v] * read_vector(at + size * (x * d->x.token + v * LANES), dtype);
            }
        }
    }
    UNROLL for (int i = 0; i < DW_TOKENS; i++)
    {
        if (i >= n)
            break;
        int64_t x = x0 + i;
        UNROLL for (int v = 0; v < nv; v++)
        {
            V value = sum[i][v];
            int64_t e = c + v * LANES;
            if (d->add.data)
                value += read_vector(
                    d->add.data + size * (b * d->add.image + y * d->add.row + x * d->add.token + e), dtype);
            write_vector(d->out.data + size * (b * d->out.image + y * d->out.row + x * d->out.token + e), value, dtype);
        }
    }
}

/* A row of nv vectors of channels. */
INLINE void depthwise_row(const depthwise_t *d, int64_t b, int64_t y, int64_t c, const int side, const int dtype,
                          const int nv)
{
    for (int64_t x = 0; x < d->width; x += DW_TOKENS)
        if (x >= side / 2 && x + DW_TOKENS + side / 2 <= d->width)
            depthwise_strip(d, b, y, x, c, side, dtype, 1, DW_TOKENS, nv);
        else
            depthwise_strip(d, b, y, x, c, side, dtype, 0, min_of(DW_TOKENS, d->width - x), nv);
}

INLINE void depthwise_rows(const depthwise_t *d, int64_t b, int64_t y, const int dtype)
{
    int64_t c = 0, step = DW_VECTORS * LANES;
    for (; c + step <= d->channels; c += step)
        if (d->side == 3)
            depthwise_row(d, b, y, c, 3, dtype, DW_VECTORS);
        else if (d->side == 5)
            depthwise_row(d, b, y, c, 5, dtype, DW_VECTORS);
        else
            depthwise_row(d, b, y, c, (int)d->side, dtype, DW_VECTORS);
#if DW_VECTORS > 1
    for (; c < d->channels; c += LANES)
        depthwise_row(d, b, y, c, (int)d->side, dtype, 1);
#endif
}

static void depthwise_task(void *context, int64_t task, char *memory)
{
    const depthwise_t *d = context;
    int64_t b = task / d->height, y = task % d->height;
    if (d->dtype == FLOAT32)
        depthwise_rows(d, b, y, FLOAT32);
    else if (d->dtype == BFLOAT16)
        depthwise_rows(d, b, y, BFLOAT16);
    else
        depthwise_rows(d, b, y, FLOAT16);
    (void)memory;
}

static int64_t depthwise(const depthwise_t *d)
{
    return spread(depthwise_task, (void *)d, d->batch * d->height, 0, d->threads);
}
