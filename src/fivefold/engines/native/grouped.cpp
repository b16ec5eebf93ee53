// Matrices of 2, 3, 4 or 8 bit codes in groups: times a few vectors, or back to bfloat16.
//
//   y_r = sum_g ( scale_rg * sum_{j in g} (q_rj - centre) x_j  +  offset_rg * sum_{j in g} x_j )
//
// Codes lie in blocks of 16 rows x 32 columns, `bits` vectors of 32 words of 16 bits each; word 2 i + p belongs to row
// i and to the columns of parity p, so one vector holds codes for the 16 lanes of a product of pairs. Word v, from its
// lowest bits, holds the codes of the column pairs k = v per, v per + 1, ... with per = 16 / bits; of 3 bits, whose
// words have one bit left, pair 15 takes the three top bits. Scales and offsets are half precision, 16 rows together.
//
// With AVX-512 a code becomes its bfloat16 value by one table look-up (vpermw reads the low five bits of every word, so
// nothing is masked) and pairs are multiplied by vdpbf16ps: three instructions for 32 weights. Otherwise plain loops.

#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512BW__) && defined(__AVX512F__)
#include <immintrin.h>
#define WIDE 1
#endif

namespace {

constexpr int ROWS = 16, COLUMNS = 32, PAIRS = 16, WORDS = 32, MOST = 4;

struct Matrix {
    const uint16_t *codes, *scale, *offset;
    int64_t tiles, blocks, per_group, groups;  // per_group: blocks of 32 columns in a group
};

float from_bf16(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_half(uint16_t bits) {
    uint32_t exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    float value = exponent ? 0 : float(mantissa) * 0x1p-24f;
    if (exponent) {
        uint32_t wide = (exponent + 112) << 23 | mantissa << 13;
        std::memcpy(&value, &wide, 4);
    }
    return bits & 0x8000 ? -value : value;
}

// The code of lane `i` for the column pair `k` of a block.
template <int BITS> inline int code(const uint16_t *block, int k, int i) {
    if (BITS == 3 && k == 15) return block[i] >> 15 | block[WORDS + i] >> 15 << 1 | block[2 * WORDS + i] >> 15 << 2;
    constexpr int per = 16 / BITS;
    return (block[k / per * WORDS + i] >> (k % per * BITS)) & ((1 << BITS) - 1);
}

#ifdef WIDE
using Vector = __m512i;

inline __m512 pairs(__m512 sum, Vector a, Vector b) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    const Vector high = _mm512_set1_epi32(int(0xffff0000));
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                          _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)),
                           _mm512_castsi512_ps(_mm512_and_si512(b, high)), sum);
#endif
}

// bfloat16 of (code - centre) * factor for 32 words of which the low `bits` bits count.
Vector table(int bits, int centre, int factor) {
    alignas(64) uint16_t values[WORDS];
    for (int i = 0; i < WORDS; ++i) values[i] = to_bf16(float(((i & ((1 << bits) - 1)) - centre) * factor));
    return _mm512_load_si512(values);
}

inline __m512 halves(const uint16_t *at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at)); }

template <int BITS, int M>
inline void block_times(const uint16_t *block, const uint32_t *const *x, Vector low, Vector high, __m512 (*sum)[2]) {
    auto add = [&](Vector words, Vector values, int k) {
        Vector found = _mm512_permutexvar_epi16(words, values);
        for (int m = 0; m < M; ++m) sum[m][k & 1] = pairs(sum[m][k & 1], found, _mm512_set1_epi32(int(x[m][k])));
    };
    constexpr int per = 16 / BITS;
    Vector rest = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int v = 0; v < BITS; ++v) {
        Vector words = _mm512_loadu_si512(block + v * WORDS);
#pragma GCC unroll 8
        for (int n = 0; n < per; ++n) {
            Vector shifted = n ? _mm512_srli_epi16(words, n * BITS) : words;
            add(shifted, low, v * per + n);
            if (BITS == 8) add(_mm512_srli_epi16(words, n * BITS + 4), high, v * per + n);
        }
        if (BITS == 3) rest = _mm512_or_si512(rest, _mm512_slli_epi16(_mm512_srli_epi16(words, 15), v));
    }
    if (BITS == 3) add(rest, low, 15);
}

template <int BITS, int M>
void tile_times(const Matrix &a, int64_t tile, const uint16_t *const *x, const float *const *sums, float *const *y) {
    const int centre = a.offset ? 0 : 1 << (BITS - 1);
    const Vector low = BITS == 8 ? table(4, 0, 1) : table(BITS, centre, 1);
    const Vector high = table(4, centre / 16, 16);
    const uint16_t *block = a.codes + tile * a.blocks * BITS * WORDS;
    __m512 total[M];
    for (int m = 0; m < M; ++m) total[m] = _mm512_setzero_ps();
    for (int64_t g = 0, b = 0; g < a.groups; ++g) {
        __m512 sum[M][2];
        for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
        for (int64_t end = b + a.per_group; b < end; ++b, block += BITS * WORDS) {
            const uint32_t *here[M];
            for (int m = 0; m < M; ++m) here[m] = (const uint32_t *)(x[m] + b * COLUMNS);
            block_times<BITS, M>(block, here, low, high, sum);
        }
        const __m512 scale = halves(a.scale + (tile * a.groups + g) * ROWS);
        for (int m = 0; m < M; ++m) total[m] = _mm512_fmadd_ps(scale, _mm512_add_ps(sum[m][0], sum[m][1]), total[m]);
        if (a.offset) {
            const __m512 offset = halves(a.offset + (tile * a.groups + g) * ROWS);
            for (int m = 0; m < M; ++m) total[m] = _mm512_fmadd_ps(offset, _mm512_set1_ps(sums[m][g]), total[m]);
        }
    }
    for (int m = 0; m < M; ++m) _mm512_storeu_ps(y[m] + tile * ROWS, total[m]);
}
#else
template <int BITS, int M>
void tile_times(const Matrix &a, int64_t tile, const uint16_t *const *x, const float *const *sums, float *const *y) {
    const float centre = a.offset ? 0 : 1 << (BITS - 1);
    const uint16_t *block = a.codes + tile * a.blocks * BITS * WORDS;
    float total[M][ROWS] = {};
    for (int64_t g = 0, b = 0; g < a.groups; ++g) {
        float sum[M][ROWS] = {};
        for (int64_t end = b + a.per_group; b < end; ++b, block += BITS * WORDS)
            for (int k = 0; k < PAIRS; ++k)
                for (int m = 0; m < M; ++m) {
                    const uint16_t *at = x[m] + b * COLUMNS + 2 * k;
                    const float even = from_bf16(at[0]), odd = from_bf16(at[1]);
                    for (int i = 0; i < ROWS; ++i)
                        sum[m][i] += float(code<BITS>(block, k, 2 * i)) * even
                                   + float(code<BITS>(block, k, 2 * i + 1)) * odd;
                }
        for (int m = 0; m < M; ++m)
            for (int i = 0; i < ROWS; ++i) {
                const int64_t at = (tile * a.groups + g) * ROWS + i;
                total[m][i] += from_half(a.scale[at]) * (sum[m][i] - centre * sums[m][g]);
                if (a.offset) total[m][i] += from_half(a.offset[at]) * sums[m][g];
            }
    }
    for (int m = 0; m < M; ++m) std::memcpy(y[m] + tile * ROWS, total[m], sizeof total[m]);
}
#endif

template <int BITS, int M>
void times(const Matrix &a, const uint16_t *x, const float *sums, float *y, int threads) {
    const uint16_t *xs[M];
    const float *ss[M];
    float *ys[M];
    for (int m = 0; m < M; ++m) {
        xs[m] = x + m * a.blocks * COLUMNS, ss[m] = sums + m * a.groups, ys[m] = y + m * a.tiles * ROWS;
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t tile = 0; tile < a.tiles; ++tile) tile_times<BITS, M>(a, tile, xs, ss, ys);
}

template <int BITS>
void all_times(const Matrix &a, const uint16_t *x, const float *sums, float *y, int64_t count, int threads) {
    const int64_t wide = a.blocks * COLUMNS, high = a.tiles * ROWS;
    while (count > 0) {
        const int64_t now = count >= MOST ? MOST : count;
        switch (now) {
        case 1: times<BITS, 1>(a, x, sums, y, threads); break;
        case 2: times<BITS, 2>(a, x, sums, y, threads); break;
        case 3: times<BITS, 3>(a, x, sums, y, threads); break;
        default: times<BITS, MOST>(a, x, sums, y, threads);
        }
        x += now * wide, sums += now * a.groups, y += now * high, count -= now;
    }
}

template <int BITS> void restore(const Matrix &a, uint16_t *out, int64_t rows, int64_t columns, int threads) {
    const float centre = a.offset ? 0 : 1 << (BITS - 1);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t tile = 0; tile < a.tiles; ++tile) {
        const int64_t last = rows - tile * ROWS < ROWS ? rows - tile * ROWS : ROWS;
        for (int64_t b = 0; b < a.blocks; ++b) {
            const uint16_t *block = a.codes + (tile * a.blocks + b) * BITS * WORDS;
            const int64_t at = (tile * a.groups + b / a.per_group) * ROWS;
            alignas(64) float scale[WORDS], offset[WORDS];
            alignas(64) uint16_t values[PAIRS][WORDS];
            for (int i = 0; i < WORDS; ++i) {
                scale[i] = from_half(a.scale[at + i / 2]);
                offset[i] = a.offset ? from_half(a.offset[at + i / 2]) : 0;
            }
            for (int k = 0; k < PAIRS; ++k)
                for (int i = 0; i < WORDS; ++i)
                    values[k][i] = to_bf16((float(code<BITS>(block, k, i)) - centre) * scale[i] + offset[i]);
            const int64_t pairs = (columns - b * COLUMNS < COLUMNS ? columns - b * COLUMNS : COLUMNS) / 2;
            for (int64_t i = 0; i < last; ++i) {
                uint16_t *row = out + (tile * ROWS + i) * columns + b * COLUMNS;
                for (int64_t k = 0; k < pairs; ++k) std::memcpy(row + 2 * k, &values[k][2 * i], 4);
            }
        }
    }
}

}  // namespace

extern "C" {

// y (count, 16 tiles) = x (count, 32 blocks) times the matrix; x in bfloat16, y in float. `offset` may be null.
void grouped_times(const uint16_t *codes, const uint16_t *scale, const uint16_t *offset, const uint16_t *x, float *y,
                   int64_t count, int64_t tiles, int64_t blocks, int64_t groups, int bits, int threads) {
    const Matrix a{codes, scale, offset, tiles, blocks, blocks / groups, groups};
    std::vector<float> sums(count * groups);
    const int64_t per = a.per_group * COLUMNS;
    for (int64_t i = 0; i < count * groups; ++i) {
        float sum = 0;
        for (int64_t j = 0; j < per; ++j) sum += from_bf16(x[i * per + j]);
        sums[i] = sum;
    }
    if (bits == 2) all_times<2>(a, x, sums.data(), y, count, threads);
    if (bits == 3) all_times<3>(a, x, sums.data(), y, count, threads);
    if (bits == 4) all_times<4>(a, x, sums.data(), y, count, threads);
    if (bits == 8) all_times<8>(a, x, sums.data(), y, count, threads);
}

// The matrix (rows, columns) in bfloat16; columns are even.
void grouped_restore(const uint16_t *codes, const uint16_t *scale, const uint16_t *offset, uint16_t *out, int64_t rows,
                     int64_t columns, int64_t tiles, int64_t blocks, int64_t groups, int bits, int threads) {
    const Matrix a{codes, scale, offset, tiles, blocks, blocks / groups, groups};
    if (bits == 2) restore<2>(a, out, rows, columns, threads);
    if (bits == 3) restore<3>(a, out, rows, columns, threads);
    if (bits == 4) restore<4>(a, out, rows, columns, threads);
    if (bits == 8) restore<8>(a, out, rows, columns, threads);
}
}
