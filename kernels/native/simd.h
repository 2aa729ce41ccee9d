/* A vector of LANES floats, and what the kernels do with it.

   The vector type of GCC and Clang has arithmetic of its own, which becomes SSE2, AVX2, AVX-512 or NEON as the file
   that includes this says; a product and a sum become one fused operation where the processor has it. Only what the
   language lacks is written with intrinsics, each beside its portable form. */
#include "call.h"

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t VI __attribute__((vector_size(4 * LANES)));
typedef float V_ANY __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE V load(const float *p) { return *(const V_ANY *)p; }
INLINE void store(float *p, V x) { *(V_ANY *)p = x; }
INLINE V splat(float x) { return x - (V){0}; }

/* The larger of both; b where one of them is NaN, so b is the operand that may be NaN. */
INLINE V larger(V a, V b)
{
#if LANES == 16
    return _mm512_max_ps(a, b);
#elif LANES == 8
    return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
    return _mm_max_ps(a, b);
#else
    VI first = a > b;
    return (V)(((VI)a & first) | ((VI)b & ~first));
#endif
}

INLINE float sum_of(V x)
{
#if LANES == 16
    return _mm512_reduce_add_ps(x);
#elif LANES == 8
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += x[i];
    return sum;
#endif
}

/* The largest lane; NaN where one is NaN is not promised (a NaN shows in the sum of a softmax). */
INLINE float largest_of(V x)
{
#if LANES == 16
    return _mm512_reduce_max_ps(x);
#elif LANES == 8
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
    float most = x[0];
    for (int i = 1; i < LANES; i++)
        most = x[i] > most ? x[i] : most;
    return most;
#endif
}

/* 1 / x of a normal number, to 1e-7 of its value. */
INLINE V inverse_of(V x)
{
#if LANES == 16
    V guess = _mm512_rcp14_ps(x);
#elif LANES == 8
    V guess = _mm256_rcp_ps(x);
#else
    return splat(1.0f) / x;
#endif
#if LANES >= 8
    return guess + guess * (splat(1.0f) - x * guess);
#endif
}

#define LOG2_E 1.44269504f

/* 2^x for x <= 1, to 2e-7 of its value above 2^-126; NaN of NaN, 0 of minus infinity.

   x = n + f with |f| <= 1/2; 2^f is a polynomial of degree 5 (minimax under p(0) = 1, error 9.2e-8). Adding and taking away
   1.5 * 2^23 rounds to the nearest whole number, and n is added to the exponent (AVX-512's scaling instruction takes a
   hundred times as long where the result is too small to be normal). What is below 2^-126 becomes exactly 0, whatever has
   been computed of it. */
INLINE V exp2_of(V x)
{
    V magic = splat(12582912.0f), shifted = x + magic, f = x - (shifted - magic);
    V p = splat(1.326472732e-3f) * f + splat(9.671512991e-3f);
    p = p * f + splat(5.550733581e-2f);
    p = p * f + splat(2.402224243e-1f);
    p = p * f + splat(6.931470037e-1f);
    p = p * f + splat(1.0f);
#if LANES == 16
    __mmask16 large = _mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ);
    __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(large, _mm512_castps_si512(p), power));
#else
    V result = (V)((VI)p + ((VI)shifted << 23));
    return (V)((VI)result & ~(VI)(x < splat(-126.0f)));
#endif
}

/* --- several vectors at once ------------------------------------------------------------------------- */

/* Two vectors' lanes in turn, from the lower or the upper half of every four lanes; of single floats and of pairs. */
#if LANES == 16
#define LOW(a, b) _mm512_unpacklo_ps(a, b)
#define HIGH(a, b) _mm512_unpackhi_ps(a, b)
#define LOW2(a, b) (V)_mm512_unpacklo_pd((__m512d)(a), (__m512d)(b))
#define HIGH2(a, b) (V)_mm512_unpackhi_pd((__m512d)(a), (__m512d)(b))
#define IN_FOURS(x, order) _mm512_permute_ps(x, order)
#elif LANES == 8
#define LOW(a, b) _mm256_unpacklo_ps(a, b)
#define HIGH(a, b) _mm256_unpackhi_ps(a, b)
#define LOW2(a, b) (V)_mm256_unpacklo_pd((__m256d)(a), (__m256d)(b))
#define HIGH2(a, b) (V)_mm256_unpackhi_pd((__m256d)(a), (__m256d)(b))
#define IN_FOURS(x, order) _mm256_permute_ps(x, order)
#elif defined(__x86_64__)
#define LOW(a, b) _mm_unpacklo_ps(a, b)
#define HIGH(a, b) _mm_unpackhi_ps(a, b)
#define LOW2(a, b) (V)_mm_unpacklo_pd((__m128d)(a), (__m128d)(b))
#define HIGH2(a, b) (V)_mm_unpackhi_pd((__m128d)(a), (__m128d)(b))
#define IN_FOURS(x, order) _mm_shuffle_ps(x, x, order)
#endif

INLINE V joined(V a, V b, const int largest) { return largest ? larger(a, b) : a + b; }

/* Sums, or the largest, of four vectors within every four lanes: lane i of the four is that of x[i]. */
INLINE V within_fours(const V *x, const int largest)
{
#if defined(LOW)
    V low = joined(LOW(x[0], x[1]), HIGH(x[0], x[1]), largest);
    V high = joined(LOW(x[2], x[3]), HIGH(x[2], x[3]), largest);
    return joined(LOW2(low, high), HIGH2(low, high), largest);
#else
    V found;
    for (int i = 0; i < 4; i++)
        found[i] = largest ? largest_of(x[i]) : sum_of(x[i]);
    return found;
#endif
}

/* Sums, or the largest, of four vectors: lane i of every four lanes is that of x[i]. */
INLINE V across_four(const V *x, const int largest)
{
    V found = within_fours(x, largest);
#if LANES == 16
    found = joined(found, _mm512_shuffle_f32x4(found, found, 0x4e), largest);
    found = joined(found, _mm512_shuffle_f32x4(found, found, 0xb1), largest);
#elif LANES == 8
    found = joined(found, _mm256_permute2f128_ps(found, found, 1), largest);
#endif
    return found;
}

/* The sums of LANES vectors: lane i is that of x[i]. */
INLINE V sums_of(const V *x)
{
#if LANES == 16
    V a = within_fours(x, 0), b = within_fours(x + 4, 0), c = within_fours(x + 8, 0), d = within_fours(x + 12, 0);
    V low = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
    V high = _mm512_shuffle_f32x4(c, d, 0x44) + _mm512_shuffle_f32x4(c, d, 0xee);
    return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
#elif LANES == 8
    V a = within_fours(x, 0), b = within_fours(x + 4, 0);
    return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
#else
    return within_fours(x, 0);
#endif
}

/* Vectors of lane 0, 1, 2 and 3 of a vector whose fours are alike. */
INLINE void spread_four(V *to, V x)
{
#if defined(IN_FOURS)
    to[0] = IN_FOURS(x, 0x00);
    to[1] = IN_FOURS(x, 0x55);
    to[2] = IN_FOURS(x, 0xaa);
    to[3] = IN_FOURS(x, 0xff);
#else
    for (int i = 0; i < 4; i++)
        to[i] = splat(x[i]);
#endif
}

#if LANES > 4
/* Sums, or the largest, of every four lanes, in all of them. */
INLINE V of_fours(V x, const int largest)
{
    x = joined(x, IN_FOURS(x, 0xb1), largest);
    return joined(x, IN_FOURS(x, 0x4e), largest);
}

/* Four floats in every four lanes. */
INLINE V load_four(const float *p)
{
#if LANES == 16
    return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
#else
    return _mm256_broadcast_ps((const __m128 *)p);
#endif
}
#endif

/* --- numbers in memory ------------------------------------------------------------------------------ */

INLINE int64_t bytes_of(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE float from_bfloat16(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bfloat16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE float from_float16(uint16_t x)
{
#if defined(__F16C__) || LANES >= 8
    return _cvtsh_ss(x);
#else
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, exponent = x >> 10 & 31, mantissa = x & 1023, bits;
    if (exponent == 0) { /* zero and what is smaller than normal: mantissa * 2^-24 */
        float value = (float)mantissa * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | mantissa << 13;
    float value;
    memcpy(&value, &bits, 4);
    return value;
#endif
}

/* To nearest, ties to even; too large becomes infinite, NaN stays NaN. */
INLINE uint16_t to_float16(float x)
{
#if defined(__F16C__) || LANES >= 8
    return (uint16_t)_cvtss_sh(x, 0);
#else
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000)
        return (uint16_t)(sign | 0x7c00);
    if (size < 0x38800000) { /* below 2^-14: adding 1/2 leaves the mantissa of float16 in the last bits */
        float value;
        memcpy(&value, &size, 4);
        value += 0.5f;
        memcpy(&bits, &value, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    return (uint16_t)(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
#endif
}

/* LANES numbers that lie side by side, as floats. */
INLINE V read_vector(const char *from, const int dtype)
{
    if (dtype == FLOAT32)
        return load((const float *)from);
    const uint16_t *x = (const uint16_t *)from;
#if LANES == 16
    __m256i half = _mm256_loadu_si256((const __m256i *)x);
    return dtype == FLOAT16 ? _mm512_cvtph_ps(half)
                            : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif LANES == 8
    __m128i half = _mm_loadu_si128((const __m128i *)x);
    return dtype == FLOAT16 ? _mm256_cvtph_ps(half)
                            : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
    V value = {0};
    for (int i = 0; i < LANES; i++)
        value[i] = dtype == FLOAT16 ? from_float16(x[i]) : from_bfloat16(x[i]);
    return value;
#endif
}

/* The inverse of read_vector. */
INLINE void write_vector(char *to, V value, const int dtype)
{
    if (dtype == FLOAT32) {
        store((float *)to, value);
        return;
    }
    uint16_t *y = (uint16_t *)to;
#if LANES == 16
    if (dtype == FLOAT16) {
        _mm256_storeu_si256((__m256i *)y, _mm512_cvtps_ph(value, 0));
        return;
    }
#if defined(ROUNDS_TO_BFLOAT16)
    _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh(value));
    return;
#endif
    __m512i bits = _mm512_castps_si512(value);
    __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(
        _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 number = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
    rounded = _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7fc0), number, rounded);
    _mm256_storeu_si256((__m256i *)y, _mm512_cvtepi32_epi16(rounded));
#elif LANES == 8
    if (dtype == FLOAT16) {
        _mm_storeu_si128((__m128i *)y, _mm256_cvtps_ph(value, 0));
        return;
    }
    __m256i bits = _mm256_castps_si256(value);
    __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(
        _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff))), 16);
    __m256i number = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_ORD_Q));
    rounded = _mm256_blendv_epi8(_mm256_set1_epi32(0x7fc0), rounded, number);
    _mm_storeu_si128((__m128i *)y, _mm_packus_epi32(_mm256_castsi256_si128(rounded),
                                                    _mm256_extracti128_si256(rounded, 1)));
#else
    for (int i = 0; i < LANES; i++)
        y[i] = dtype == FLOAT16 ? to_float16(value[i]) : to_bfloat16(value[i]);
#endif
}

INLINE float read_number(const char *from, int64_t dtype)
{
    if (dtype == FLOAT32)
        return *(const float *)from;
    return dtype == FLOAT16 ? from_float16(*(const uint16_t *)from) : from_bfloat16(*(const uint16_t *)from);
}

INLINE void write_number(char *to, float value, int64_t dtype)
{
    if (dtype == FLOAT32)
        *(float *)to = value;
    else
        *(uint16_t *)to = dtype == FLOAT16 ? to_float16(value) : to_bfloat16(value);
}

INLINE void read_row_as(float *to, const char *from, int64_t n, float factor, const int dtype)
{
    V by = splat(factor);
    for (int64_t i = 0; i < n; i += LANES)
        store(to + i, read_vector(from + i * (dtype == FLOAT32 ? 4 : 2), dtype) * by);
}

/* n numbers of a map, `step` apart, as floats times a factor. Whole vectors side by side are the rule. */
INLINE void read_row(float *to, const char *from, int64_t dtype, int64_t step, int64_t n, float factor)
{
    if (step == 1 && n % LANES == 0) {
        if (dtype == FLOAT32)
            read_row_as(to, from, n, factor, FLOAT32);
        else if (dtype == BFLOAT16)
            read_row_as(to, from, n, factor, BFLOAT16);
        else
            read_row_as(to, from, n, factor, FLOAT16);
        return;
    }
    for (int64_t i = 0; i < n; i++)
        to[i] = read_number(from + i * step * bytes_of(dtype), dtype) * factor;
}

INLINE void write_row_as(char *to, const float *from, int64_t n, float factor, const int dtype)
{
    V by = splat(factor);
    for (int64_t i = 0; i < n; i += LANES)
        write_vector(to + i * (dtype == FLOAT32 ? 4 : 2), load(from + i) * by, dtype);
}

/* The inverse of read_row. */
INLINE void write_row(char *to, const float *from, int64_t dtype, int64_t step, int64_t n, float factor)
{
    if (step == 1 && n % LANES == 0) {
        if (dtype == FLOAT32)
            write_row_as(to, from, n, factor, FLOAT32);
        else if (dtype == BFLOAT16)
            write_row_as(to, from, n, factor, BFLOAT16);
        else
            write_row_as(to, from, n, factor, FLOAT16);
        return;
    }
    for (int64_t i = 0; i < n; i++)
        write_number(to + i * step * bytes_of(dtype), from[i] * factor, dtype);
}

/* --- transposing ------------------------------------------------------------------------------------ */

/* Rows of four floats become columns: lane group g of rows[i] is row 4 * g + i, so that every result holds one
   channel of LANES rows in order. */
#if LANES == 16
#define QUADS(p, i) _mm512_insertf32x4(_mm512_insertf32x4(_mm512_insertf32x4(_mm512_castps128_ps512( \
    _mm_loadu_ps(p[i])), _mm_loadu_ps(p[i + 4]), 1), _mm_loadu_ps(p[i + 8]), 2), _mm_loadu_ps(p[i + 12]), 3)
#elif LANES == 8
#define QUADS(p, i) _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p[i])), _mm_loadu_ps(p[i + 4]), 1)
#endif

/* n < LANES floats. */
INLINE void copy_few(float *to, const float *from, int64_t n)
{
#if LANES == 16
    __mmask16 these = (__mmask16)((1 << n) - 1);
    _mm512_mask_storeu_ps(to, these, _mm512_maskz_loadu_ps(these, from));
#elif LANES == 8
    __m256i these = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    _mm256_maskstore_ps(to, these, _mm256_maskload_ps(from, these));
#else
    for (int64_t i = 0; i < n; i++)
        to[i] = from[i];
#endif
}

/* LANES floats out of LANES / 4 blocks, four from each. */
INLINE V load_quads(const float *const *blocks, int64_t at)
{
#if LANES == 16
    __m512 low = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(blocks[0] + at)), _mm_loadu_ps(blocks[1] + at), 1);
    return _mm512_insertf32x4(_mm512_insertf32x4(low, _mm_loadu_ps(blocks[2] + at), 2), _mm_loadu_ps(blocks[3] + at), 3);
#elif LANES == 8
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(blocks[0] + at)), _mm_loadu_ps(blocks[1] + at), 1);
#else
    return load(blocks[0] + at);
#endif
}

/* to[d * ld + j] = rows[j][d] for n rows and a multiple of four channels. */
static void transpose(float *to, int64_t ld, const float *const *rows, int64_t n, int64_t channels)
{
    int64_t j = 0;
#if LANES > 4
    for (; j + LANES <= n; j += LANES)
        for (int64_t d = 0; d < channels; d += 4) {
            const float *p[LANES];
            for (int i = 0; i < LANES; i++)
                p[i] = rows[j + i] + d;
            V a = QUADS(p, 0), b = QUADS(p, 1), c = QUADS(p, 2), e = QUADS(p, 3);
            V ab_low = LOW(a, b), ab_high = HIGH(a, b), ce_low = LOW(c, e), ce_high = HIGH(c, e);
            store(to + d * ld + j, LOW2(ab_low, ce_low));
            store(to + (d + 1) * ld + j, HIGH2(ab_low, ce_low));
            store(to + (d + 2) * ld + j, LOW2(ab_high, ce_high));
            store(to + (d + 3) * ld + j, HIGH2(ab_high, ce_high));
        }
#endif
#if defined(__x86_64__)
    for (; j + 4 <= n; j += 4)
        for (int64_t d = 0; d < channels; d += 4) {
            __m128 a = _mm_loadu_ps(rows[j] + d), b = _mm_loadu_ps(rows[j + 1] + d);
            __m128 c = _mm_loadu_ps(rows[j + 2] + d), e = _mm_loadu_ps(rows[j + 3] + d);
            _MM_TRANSPOSE4_PS(a, b, c, e);
            _mm_storeu_ps(to + d * ld + j, a);
            _mm_storeu_ps(to + (d + 1) * ld + j, b);
            _mm_storeu_ps(to + (d + 2) * ld + j, c);
            _mm_storeu_ps(to + (d + 3) * ld + j, e);
        }
#endif
    for (; j < n; j++)
        for (int64_t d = 0; d < channels; d++)
            to[d * ld + j] = rows[j][d];
}
