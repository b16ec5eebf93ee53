// Products with matrices of -1, 0 and 1: y = scale * (W x), 2 bits per weight.
//
//   codes   uint8 (rows, 16 * blocks)   blocks = ceil(columns / 64); weight 64 b + 16 j + i is bits 2 j, 2 j + 1 of
//                                       byte 16 b + i, as weight + 1; columns past the last hold 1
//   scale   float16 (rows, groups)      of `group` columns each, a multiple of 64, or one of the whole row
//
// ternary_float sums float32 activations. ternary_int8 rounds each activation vector to 8 bits, a = max|x| / 127, and
// sums whole numbers: sum (w + 1) q - sum q, exact. With AVX-512 VNNI one instruction adds 64 such products; x is laid
// out beforehand in the order in which the four fields of 64 bytes come. With AVX2 floats take a shift, vpermilps (8
// codes become -s, 0 or s) and a product for 8 weights, whole numbers a shift, a mask, vpmaddubsw and a sum for 32.
// Elsewhere plain C++ does the same sums.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__F16C__)
#include <immintrin.h>
#define WIDE 1
#if defined(__AVX512VNNI__)
#define VNNI 1
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define NARROW 1
#endif

namespace {

constexpr int64_t BLOCK = 64, BYTES = 16, CHUNK = 256;
constexpr int64_t WORTH = 1 << 16;  // weights that are worth more threads

float widened(uint16_t half) {
#if defined(WIDE) || defined(NARROW)
    return _cvtsh_ss(half);
#else
    const uint32_t sign = uint32_t(half & 0x8000) << 16, power = half >> 10 & 31, part = half & 1023;
    if (power == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(float(part), -24);
    const uint32_t bits = sign | (power == 31 ? 255u << 23 : (power + 112) << 23) | part << 13;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
#endif
}

#ifdef NARROW
constexpr int64_t AHEAD = 2048;  // bytes

__m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

float total(__m256 v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// Sum of weight * x over a row whose groups have `step` blocks.
float row_dot(const uint8_t* codes, const uint16_t* scale, const float* x, int64_t blocks, int64_t step) {
    const __m256 signs = _mm256_setr_ps(-1, 0, 1, 0, -1, 0, 1, 0);
    __m256 sums[8];
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    for (int64_t b = 0; b < blocks; scale++) {
        const __m256 values = _mm256_mul_ps(signs, _mm256_set1_ps(widened(*scale)));
        for (const int64_t end = std::min(blocks, b + step); b < end; b++) {
            _mm_prefetch(reinterpret_cast<const char*>(codes + BYTES * b) + AHEAD, _MM_HINT_T0);
            for (int h = 0; h < 2; h++) {
                __m256i w = _mm256_cvtepu8_epi32(_mm_loadu_si64(codes + BYTES * b + 8 * h));
                for (int j = 0; j < 4; j++) {
                    __m256& sum = sums[4 * h + j];
                    const __m256 at = _mm256_loadu_ps(x + BLOCK * b + 16 * j + 8 * h);
                    sum = _mm256_fmadd_ps(_mm256_permutevar_ps(values, w), at, sum);
                    w = _mm256_srli_epi32(w, 2);
                }
            }
        }
    }
    for (int i = 0; i < 4; i++) sums[i] = _mm256_add_ps(sums[i], sums[i + 4]);
    return total(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
}
#else
// Sum of weight * x over blocks [from, to) of a row.
float dot(const uint8_t* codes, const float* x, int64_t from, int64_t to) {
#ifdef WIDE
    const __m512 table = _mm512_setr_ps(-1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0);
    __m512 sums[4];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t b = from; b < to; b++) {
        __m512i w = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + BYTES * b)));
        for (int j = 0; j < 4; j++) {
            const __m512 value = _mm512_permutexvar_ps(w, table);
            sums[j] = _mm512_fmadd_ps(value, _mm512_loadu_ps(x + BLOCK * b + 16 * j), sums[j]);
            w = _mm512_srli_epi32(w, 2);
        }
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
#else
    float sum = 0;
    for (int64_t b = from; b < to; b++)
        for (int j = 0; j < 4; j++)
            for (int i = 0; i < 16; i++)
                sum += float((codes[BYTES * b + i] >> 2 * j & 3) - 1) * x[BLOCK * b + 16 * j + i];
    return sum;
#endif
}

float row_dot(const uint8_t* codes, const uint16_t* scale, const float* x, int64_t blocks, int64_t step) {
    float sum = 0;
    for (int64_t b = 0; b < blocks; b += step) sum += widened(*scale++) * dot(codes, x, b, std::min(blocks, b + step));
    return sum;
}
#endif

// One activation vector in 8 bits. `q` holds chunks of 256 as the kernel reads them; `less` minus their sums.
struct Rounded {
    std::vector<int8_t> q;
    std::vector<int32_t> less;
    float scale = 0;

    Rounded(const float* x, int64_t columns, int64_t blocks) {
        const int64_t chunks = (blocks + 3) / 4;
        q.assign(CHUNK * chunks, 0);
        less.assign(16 * chunks, 0);
        float most = 0;
        bool finite = true;
        for (int64_t i = 0; i < columns; i++) {
            most = std::max(most, std::fabs(x[i]));
            finite &= std::fabs(x[i]) <= FLT_MAX;
        }
        scale = finite ? most / 127 : NAN;
        if (!finite) return;
        const float up = most > 0 ? 127 / most : 0;
        std::vector<float> padded(BLOCK * blocks, 0.0f);
        for (int64_t i = 0; i < columns; i++) padded[i] = x[i] * up;
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t j = 0; j < 4; j++) {
                const float* from = padded.data() + BLOCK * b + 16 * j;
                int8_t* to = q.data() + CHUNK * (b / 4) + 64 * j + 16 * (b % 4);
                int32_t* sums = less.data() + 16 * (b / 4) + 4 * (b % 4);
                for (int i = 0; i < 16; i++) to[i] = int8_t(int32_t(std::nearbyint(from[i])));
                for (int i = 0; i < 16; i++) sums[i / 4] -= to[i];
            }
    }
};

#ifdef VNNI
// 16 sums of 16 weights each of one chunk: lanes 4 b to 4 b + 3 belong to block b of the chunk.
__m512i partial(const uint8_t* row, const Rounded& x, int64_t chunk, int64_t blocks) {
    const int64_t left = BYTES * blocks - 64 * chunk;
    const __mmask64 there = left >= 64 ? ~0ull : (1ull << left) - 1;
    __m512i w = _mm512_maskz_loadu_epi8(there, row + 64 * chunk);
    const __m512i two = _mm512_set1_epi8(3);
    __m512i sum = _mm512_loadu_si512(x.less.data() + 16 * chunk);
    for (int j = 0; j < 4; j++) {
        sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(w, two), _mm512_loadu_si512(x.q.data() + CHUNK * chunk + 64 * j));
        w = _mm512_srli_epi16(w, 2);
    }
    return sum;
}
#elif defined(NARROW)
// 8 sums of 16 weights each: lanes 0 to 3 belong to block b, an even one, and the others to the next, if there is one.
__m256i partial(const uint8_t* row, const Rounded& x, int64_t b, int64_t blocks) {
    const uint8_t* at = row + BYTES * b;
    _mm_prefetch(reinterpret_cast<const char*>(at) + AHEAD, _MM_HINT_T0);
    const __m256i low = _mm256_set1_epi8(3), one = _mm256_set1_epi16(1);
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    const __m256i w = b + 1 < blocks ? load(at) : _mm256_zextsi128_si256(first);
    const int8_t* q = x.q.data() + CHUNK * (b / 4) + 16 * (b % 4);
    __m256i sum = _mm256_setzero_si256();
    for (int j = 0; j < 4; j++) {
        const __m256i weights = _mm256_and_si256(_mm256_srli_epi16(w, 2 * j), low);
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, load(q + 64 * j)));
    }
    return _mm256_add_epi32(_mm256_madd_epi16(sum, one), load(x.less.data() + 4 * b));
}
#endif

// Sum of weight * q over the row, times its scales.
float dot(const uint8_t* row, const uint16_t* scale, const Rounded& x, int64_t blocks, int64_t group) {
#ifdef VNNI
    const int64_t chunks = (blocks + 3) / 4;
    if (group >= BLOCK * blocks) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t c = 0; c < chunks; c++) sum = _mm512_add_epi32(sum, partial(row, x, c, blocks));
        return float(_mm512_reduce_add_epi32(sum)) * widened(scale[0]);
    }
    const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < chunks; c++) {
        float own[4] = {0, 0, 0, 0};
        for (int64_t b = 0; b < std::min<int64_t>(4, blocks - 4 * c); b++)
            own[b] = widened(scale[(CHUNK * c + BLOCK * b) / group]);
        const __m512 scales = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(_mm_loadu_ps(own)));
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(partial(row, x, c, blocks)), scales, sum);
    }
    return _mm512_reduce_add_ps(sum);
#elif defined(NARROW)
    if (group >= BLOCK * blocks) {
        __m256i sum = _mm256_setzero_si256();
        for (int64_t b = 0; b < blocks; b += 2) sum = _mm256_add_epi32(sum, partial(row, x, b, blocks));
        return total(_mm256_cvtepi32_ps(sum)) * widened(*scale);
    }
    const int64_t step = group / BLOCK;
    __m256 sum = _mm256_setzero_ps();
    for (int64_t b = 0, left = step; b < blocks; b += 2) {
        __m128 own[2];
        for (int i = 0; i < 2; i++) {
            own[i] = _mm_set1_ps(b + i < blocks ? widened(*scale) : 0);
            if (--left == 0) left = step, scale++;
        }
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(partial(row, x, b, blocks)), _mm256_set_m128(own[1], own[0]), sum);
    }
    return total(sum);
#else
    float sum = 0;
    for (int64_t b = 0; b < blocks; b++) {
        const int8_t* q = x.q.data() + CHUNK * (b / 4) + 16 * (b % 4);
        int32_t whole = 0;
        for (int j = 0; j < 4; j++)
            for (int i = 0; i < 16; i++)
                whole += ((row[BYTES * b + i] >> 2 * j & 3) - 1) * q[64 * j + i];
        sum += float(whole) * widened(scale[group >= BLOCK * blocks ? 0 : BLOCK * b / group]);
    }
    return sum;
#endif
}

}  // namespace

// x float32 (count, columns) -> out float32 (count, rows). `group` 0: one scale per row.

extern "C" void ternary_float(const uint8_t* codes, const uint16_t* scale, const float* x, float* out, int64_t count,
                              int64_t rows, int64_t columns, int64_t group) {
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
    const int64_t groups = group ? (columns + group - 1) / group : 1, step = group ? group / BLOCK : blocks;
    std::vector<float> padded(BLOCK * blocks, 0.0f);
    for (int64_t n = 0; n < count; n++) {
        std::memcpy(padded.data(), x + n * columns, sizeof(float) * columns);
        const float* input = padded.data();
#pragma omp parallel for schedule(static) if (rows * columns > WORTH)
        for (int64_t r = 0; r < rows; r++)
            out[n * rows + r] = row_dot(codes + r * BYTES * blocks, scale + r * groups, input, blocks, step);
    }
}

extern "C" void ternary_int8(const uint8_t* codes, const uint16_t* scale, const float* x, float* out, int64_t count,
                             int64_t rows, int64_t columns, int64_t group) {
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK, groups = group ? (columns + group - 1) / group : 1;
    for (int64_t n = 0; n < count; n++) {
        const Rounded input(x + n * columns, columns, blocks);
#pragma omp parallel for schedule(static) if (rows * columns > WORTH)
        for (int64_t r = 0; r < rows; r++)
            out[n * rows + r] = input.scale * dot(codes + r * BYTES * blocks, scale + r * groups, input, blocks,
                                                  group ? group : BLOCK * blocks);
    }
}
