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
// nothing is masked) and pairs are multiplied by vdpbf16ps: three instructions for 32 weights.
//
// With AVX2 the two columns of a pair become 16-bit whole numbers times a power of two: exact in bfloat16 unless one is
// 2^7 times smaller than the other, and then to 2^-15 of the larger. A code stays where it lies (the power of two makes
// up for it): a mask or shift, vpmaddwd, a conversion and a product, four instructions for 16 weights. Otherwise plain
// loops.

#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512BW__) && defined(__AVX512F__)
#include <immintrin.h>
#define WIDE 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define NARROW 1
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

#ifndef NARROW
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
#endif

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
#elif defined(NARROW)
using Vector = __m256i;
constexpr int LANES = 8, HALVES = 2;  // a block has two vectors of 8 rows
constexpr int64_t AHEAD = 2048;       // bytes

// 32 columns: the halves of `whole` times `step`, which also divides by 2^place of the pair.
struct Input {
    int32_t whole[PAIRS];
    float step[PAIRS];
};

inline Vector load(const void *at) { return _mm256_loadu_si256((const Vector *)at); }
inline __m256 halves(const uint16_t *at) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at)); }

// The lowest bit of the codes of pair `k` when they are multiplied; the topmost would make negative numbers.
template <int BITS> constexpr int place(int k) {
    constexpr int per = 16 / BITS;
    const bool top = k / per == BITS || (k % per + 1) * BITS == 16;
    return top ? 0 : k % per * BITS;
}

template <int BITS> std::vector<Input> inputs(const uint16_t *x, int64_t blocks) {
    const Vector high = _mm256_set1_epi32(int(0xffff0000)), exponent = _mm256_set1_epi32(0x7f800000);
    const Vector up = _mm256_set1_epi32(268 << 23), down = _mm256_set1_epi32(14 << 23);
    const Vector least = _mm256_set1_epi32(27 << 23);  // numbers below 2^-115 become 0
    std::vector<Input> out(blocks);
    alignas(32) float places[PAIRS];
    for (int k = 0; k < PAIRS; ++k) places[k] = 1.0f / float(1 << place<BITS>(k));
    for (int64_t b = 0; b < blocks; ++b)
        for (int k = 0; k < PAIRS; k += LANES) {
            const Vector both = load(x + b * COLUMNS + 2 * k);
            const Vector even = _mm256_slli_epi32(both, 16), odd = _mm256_and_si256(both, high);
            const Vector size = _mm256_max_epi32(_mm256_and_si256(even, exponent), _mm256_and_si256(odd, exponent));
            const Vector power = _mm256_max_epi32(size, least);
            const __m256 times = _mm256_castsi256_ps(_mm256_sub_epi32(up, power));
            auto whole = [&](Vector v) { return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(v), times)); };
            const Vector pair = _mm256_blend_epi16(whole(even), _mm256_slli_epi32(whole(odd), 16), 0xaa);
            const __m256 unit = _mm256_castsi256_ps(_mm256_sub_epi32(power, down));
            const __m256 step = _mm256_mul_ps(unit, _mm256_load_ps(places + k));
            const Vector nan = _mm256_cmpeq_epi32(size, exponent);  // infinite or no number: no sum is one
            _mm256_storeu_si256((Vector *)(out[b].whole + k), pair);
            _mm256_storeu_ps(out[b].step + k, _mm256_or_ps(step, _mm256_castsi256_ps(nan)));
        }
    return out;
}

template <int BITS, int M, int CHAINS>
inline void block_times(const uint16_t *block, const Input *const *x, __m256 (*sum)[HALVES][CHAINS]) {
    auto add = [&](Vector codes, int half, int k) {
        for (int m = 0; m < M; ++m) {
            const Vector whole = _mm256_madd_epi16(codes, _mm256_set1_epi32(x[m]->whole[k]));
            __m256 &to = sum[m][half][k % CHAINS];
            to = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(x[m]->step[k]), to);
        }
    };
    constexpr int per = 16 / BITS;
    Vector rest[HALVES] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 8
    for (int v = 0; v < BITS; ++v) {
        _mm_prefetch((const char *)(block + v * WORDS) + AHEAD, _MM_HINT_T0);
        const Vector words[HALVES] = {load(block + v * WORDS), load(block + v * WORDS + WORDS / 2)};
#pragma GCC unroll 8
        for (int n = 0; n < per; ++n)
#pragma GCC unroll 2
            for (int h = 0; h < HALVES; ++h) {
                const Vector mask = _mm256_set1_epi16(short(((1 << BITS) - 1) << n * BITS));
                const bool top = (n + 1) * BITS == 16;
                add(top ? _mm256_srli_epi16(words[h], n * BITS) : _mm256_and_si256(words[h], mask), h, v * per + n);
            }
        if (BITS == 3)
            for (int h = 0; h < HALVES; ++h)
                rest[h] = _mm256_or_si256(rest[h], _mm256_slli_epi16(_mm256_srli_epi16(words[h], 15), v));
    }
    if (BITS == 3)
        for (int h = 0; h < HALVES; ++h) add(rest[h], h, 15);
}

template <int BITS, int M>
void tile_times(const Matrix &a, int64_t tile, const Input *const *x, const float *const *sums, float *const *y) {
    constexpr int CHAINS = M == 1 ? 2 : 1;
    const __m256 centre = _mm256_set1_ps(-float(1 << (BITS - 1)));
    const uint16_t *block = a.codes + tile * a.blocks * BITS * WORDS;
    __m256 total[M][HALVES];
    for (auto &one : total) one[0] = one[1] = _mm256_setzero_ps();
    for (int64_t g = 0, b = 0; g < a.groups; ++g) {
        __m256 sum[M][HALVES][CHAINS];
        for (auto &one : sum) for (auto &half : one) for (auto &chain : half) chain = _mm256_setzero_ps();
        for (int64_t end = b + a.per_group; b < end; ++b, block += BITS * WORDS) {
            const Input *here[M];
            for (int m = 0; m < M; ++m) here[m] = x[m] + b;
            block_times<BITS, M, CHAINS>(block, here, sum);
        }
        for (int h = 0; h < HALVES; ++h) {
            const int64_t at = (tile * a.groups + g) * ROWS + h * LANES;
            const __m256 scale = halves(a.scale + at);
            const __m256 offset = a.offset ? halves(a.offset + at) : _mm256_mul_ps(scale, centre);
            for (int m = 0; m < M; ++m) {
                const __m256 all = CHAINS == 2 ? _mm256_add_ps(sum[m][h][0], sum[m][h][CHAINS - 1]) : sum[m][h][0];
                total[m][h] = _mm256_fmadd_ps(scale, all, total[m][h]);
                total[m][h] = _mm256_fmadd_ps(offset, _mm256_set1_ps(sums[m][g]), total[m][h]);
            }
        }
    }
    for (int m = 0; m < M; ++m)
        for (int h = 0; h < HALVES; ++h) _mm256_storeu_ps(y[m] + tile * ROWS + h * LANES, total[m][h]);
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

#ifdef NARROW
constexpr int INPUTS = 1;
#else
using Input = uint16_t;
constexpr int INPUTS = COLUMNS;
template <int BITS> const Input *inputs(const uint16_t *x, int64_t) { return x; }
#endif

template <int BITS, int M>
void times(const Matrix &a, const Input *x, const float *sums, float *y, int threads) {
    const Input *xs[M];
    const float *ss[M];
    float *ys[M];
    for (int m = 0; m < M; ++m) {
        xs[m] = x + m * a.blocks * INPUTS, ss[m] = sums + m * a.groups, ys[m] = y + m * a.tiles * ROWS;
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t tile = 0; tile < a.tiles; ++tile) tile_times<BITS, M>(a, tile, xs, ss, ys);
}

template <int BITS>
void all_times(const Matrix &a, const uint16_t *given, const float *sums, float *y, int64_t count, int threads) {
    const int64_t wide = a.blocks * INPUTS, high = a.tiles * ROWS;
    const auto made = inputs<BITS>(given, count * a.blocks);
    const Input *x = &made[0];
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

#ifdef NARROW
// The codes of pair `k` of 8 rows, each in the low bits of its word.
template <int BITS> inline Vector codes(const uint16_t *block, int k) {
    constexpr int per = 16 / BITS;
    const Vector mask = _mm256_set1_epi16((1 << BITS) - 1);
    auto top = [&](int v) { return _mm256_srli_epi16(load(block + v * WORDS), 15); };
    if (BITS == 3 && k == 15)
        return _mm256_or_si256(top(0), _mm256_or_si256(_mm256_slli_epi16(top(1), 1), _mm256_slli_epi16(top(2), 2)));
    return _mm256_and_si256(_mm256_srli_epi16(load(block + k / per * WORDS), k % per * BITS), mask);
}

inline Vector rounded(__m256 value) {
    const Vector bits = _mm256_castps_si256(value), half = _mm256_set1_epi32(0x7fff), one = _mm256_set1_epi32(1);
    return _mm256_add_epi32(bits, _mm256_add_epi32(half, _mm256_and_si256(_mm256_srli_epi32(bits, 16), one)));
}

// Rows of words become columns.
inline void turn(Vector (&v)[LANES]) {
    Vector t[LANES], u[LANES];
    for (int i = 0; i < LANES; i += 2)
        t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]), t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; ++j) {
            u[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            u[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
        v[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
    }
}

// A block in bfloat16, 16 rows of pairs.
template <int BITS>
void block_values(const uint16_t *block, const uint16_t *scales, const uint16_t *offsets, uint32_t (*values)[PAIRS]) {
    const Vector low = _mm256_set1_epi32(0xffff);
    for (int h = 0; h < HALVES; ++h) {
        const __m256 scale = halves(scales + h * LANES), centre = _mm256_set1_ps(-float(1 << (BITS - 1)));
        const __m256 offset = offsets ? halves(offsets + h * LANES) : _mm256_mul_ps(scale, centre);
        auto value = [&](Vector code) { return rounded(_mm256_fmadd_ps(_mm256_cvtepi32_ps(code), scale, offset)); };
#pragma GCC unroll 2
        for (int first = 0; first < PAIRS; first += LANES) {
            Vector v[LANES];
#pragma GCC unroll 8
            for (int k = 0; k < LANES; ++k) {
                const Vector both = codes<BITS>(block + h * WORDS / 2, first + k);
                const Vector even = value(_mm256_and_si256(both, low)), odd = value(_mm256_srli_epi32(both, 16));
                v[k] = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
            }
            turn(v);
            for (int i = 0; i < LANES; ++i) _mm256_store_si256((Vector *)(values[h * LANES + i] + first), v[i]);
        }
    }
}

template <int BITS>
void restore_block(const Matrix &a, int64_t tile, int64_t b, uint16_t *out, int64_t stride, int64_t high,
                   int64_t wide) {
    alignas(32) uint32_t values[ROWS][PAIRS];
    const int64_t at = (tile * a.groups + b / a.per_group) * ROWS;
    const uint16_t *block = a.codes + (tile * a.blocks + b) * BITS * WORDS;
    block_values<BITS>(block, a.scale + at, a.offset ? a.offset + at : nullptr, values);
    for (int64_t i = 0; i < high; ++i) {
        if (wide == COLUMNS) std::memcpy(out + i * stride, values[i], 2 * COLUMNS);  // of a known size
        else std::memcpy(out + i * stride, values[i], 2 * wide);
    }
}
#else
template <int BITS>
void restore_block(const Matrix &a, int64_t tile, int64_t b, uint16_t *out, int64_t stride, int64_t high,
                   int64_t wide) {
    const float centre = a.offset ? 0 : 1 << (BITS - 1);
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
    for (int64_t i = 0; i < high; ++i)
        for (int64_t k = 0; k < wide / 2; ++k) std::memcpy(out + i * stride + 2 * k, &values[k][2 * i], 4);
}
#endif

template <int BITS> void restore(const Matrix &a, uint16_t *out, int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t tile = 0; tile < a.tiles; ++tile) {
        const int64_t high = rows - tile * ROWS < ROWS ? rows - tile * ROWS : ROWS;
        for (int64_t b = 0; b < a.blocks; ++b) {
            const int64_t wide = columns - b * COLUMNS < COLUMNS ? columns - b * COLUMNS : COLUMNS;
            restore_block<BITS>(a, tile, b, out + tile * ROWS * columns + b * COLUMNS, columns, high, wide);
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
