// Linear layer with weights and activations in 8 bits: whole-number products, one scale per row and per token.
//
//   y_mr = a_m s_r sum_j p_mj q_rj + bias_r + sum_{j beside} x_mj w_rj         p_mj = round(x_mj / a_m)
//
// a_m = max_j |x_mj| / 127 over the columns that are not beside. Beside are, in float, the columns in `columns` (with
// their own weights in bfloat16), or of every token those whose |x_mj| exceeds `limit` (weights s_r q_rj).
//
// Weights lie in tiles of 16 rows, in a tile four columns of all 16 rows together: one vector of 64 bytes. All sums are
// exact, so every path gives the same bits. -DPLAIN compiles the loops for other processors.
//
// AVX-512 VNNI: vpdpbusd multiplies the vector with four activations at once. It takes unsigned times signed, so
// activations are stored as p + 128 and sums start at -128 sum_j q_rj. Many tokens: 3 tiles x 8 tokens of sums stay in
// registers; 24 products for 11 loads. One token: a tile is one stream.
//
// AVX2: weights are widened to 16 bits (vpmovsxbw), as p is stored, and vpmaddwd adds pairs of products; vpmaddubsw on
// 8 bits would saturate. Many tokens: 8 rows x 6 tokens of sums stay in registers; one token: a tile is one stream.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(PLAIN)
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WIDE 1
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define PAIRS 1
#endif
#define UNROLL _Pragma("GCC unroll 8")

extern "C" {
struct Layer {
    const int8_t *codes;
    const int32_t *start;  // -128 times the sum of a row's codes
    const float *scale, *bias;
    const int32_t *columns;
    const uint16_t *beside;  // (columns, 16 tiles)
    int64_t besides, rows, width, tiles, quads;
    float limit;
};
}

namespace {

#ifdef PAIRS
using Code = int16_t;
constexpr int ZERO = 0, TOKENS = 6;
#else
using Code = uint8_t;
constexpr int ZERO = 128, TOKENS = 8;
#endif
constexpr int ROWS = 16, QUAD = 4, VECTOR = 64, CHUNK = 128, AHEAD = 2048;
constexpr uint32_t INFINITE = 0x7f800000u;

using Ints = int32_t __attribute__((vector_size(ROWS * 4)));
using Lanes = float __attribute__((vector_size(ROWS * 4)));

struct Odd { int32_t column; float value; };

uint32_t bits_of(float value) { uint32_t bits; std::memcpy(&bits, &value, 4); return bits; }
float of_bits(uint32_t bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline float wide(float value) { return value; }
inline float wide(uint16_t bits) { return of_bits(uint32_t(bits) << 16); }

// Largest |x| as bits: an order that also holds for infinite and NaN, which -ffast-math would lose.
template <class T> uint32_t largest(const T *x, int64_t width) {
    uint32_t top = 0;
    for (int64_t j = 0; j < width; ++j) top = std::max(top, bits_of(wide(x[j])) & 0x7fffffffu);
    return top;
}

template <class T> float rounded(const T *x, int64_t width, Code *out, uint32_t top) {
    if (top >= INFINITE) return std::fill_n(out, width, Code(ZERO)), of_bits(INFINITE | 1u << 22);
    const float step = of_bits(top) / 127, inverse = step > 1e-37f ? 1 / step : 0;
    for (int64_t j = 0; j < width; ++j) out[j] = Code(int32_t(std::nearbyintf(wide(x[j]) * inverse)) + ZERO);
    return step;
}

// Codes and step of one token. Inputs of columns beside go to `beside`, those above the limit to `odd`.
template <class T>
float quantized(const Layer &a, const T *x, Code *out, float *beside, std::vector<Odd> &odd) {
    static thread_local std::vector<float> room;
    std::fill_n(out + a.width, a.quads * QUAD - a.width, Code(ZERO));
    odd.clear();
    uint32_t top = largest(x, a.width);
    if (!a.besides && !(top < INFINITE && of_bits(top) > a.limit)) return rounded(x, a.width, out, top);
    room.resize(a.width);
    for (int64_t j = 0; j < a.width; ++j) room[j] = wide(x[j]);
    for (int64_t n = 0; n < a.besides; ++n) beside[n] = room[a.columns[n]], room[a.columns[n]] = 0;
    if (!a.besides)
        for (int64_t j = 0; j < a.width; ++j)
            if (std::fabs(room[j]) > a.limit) odd.push_back({int32_t(j), room[j]}), room[j] = 0;
    return rounded(room.data(), a.width, out, largest(room.data(), a.width));
}

struct Tokens {
    std::vector<Code> codes;
    std::vector<float> step, beside;
    std::vector<std::vector<Odd>> odd;
};

template <class V, class T> inline V load(const T *at) { V value; std::memcpy(&value, at, sizeof value); return value; }
inline Lanes lanes(const uint16_t *at) {
    using Narrow = uint16_t __attribute__((vector_size(ROWS * 2)));
    return (Lanes)(__builtin_convertvector(load<Narrow>(at), Ints) << 16);
}

#ifdef PAIRS

// Sums of G groups of 4 rows and M tokens; a row's sum is that of two neighbours.
template <int G, int M>
inline void strip(const int8_t *w, const Code *x, int64_t quads, __m256i (*sum)[M]) {
    for (const Code *end = x + quads * QUAD, *at = x; at < end; at += QUAD, w += VECTOR) {
        __m256i q[G];
        if (M == 1) __builtin_prefetch(w + AHEAD);
        UNROLL for (int g = 0; g < G; ++g) q[g] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + g * 16)));
        UNROLL for (int m = 0; m < M; ++m) {
            const __m256i four = _mm256_set1_epi64x(load<int64_t>(at + m * quads * QUAD));
            UNROLL for (int g = 0; g < G; ++g) {
                sum[g][m] = _mm256_add_epi32(sum[g][m], _mm256_madd_epi16(q[g], four));
                __asm__("" : "+x"(sum[g][m]));  // else GCC keeps it in memory
            }
        }
    }
}

template <int B, int M> inline void dots(const Layer &a, int64_t tile, const Code *x, Ints (*out)[M]) {
    constexpr int G = M < 4 ? 4 : 2;
    for (int b = 0; b < B; ++b)
        for (int first = 0; first < 4; first += G) {
            __m256i sum[G][M] = {};
            strip<G, M>(a.codes + (tile + b) * a.quads * VECTOR + first * 16, x, a.quads, sum);
            for (int m = 0; m < M; ++m)
                for (int g = 0; g < G; g += 2) {
                    const __m256i both = _mm256_hadd_epi32(sum[g][m], sum[g + 1][m]);
                    const __m256i eight = _mm256_permute4x64_epi64(both, 0xd8);
                    std::memcpy((char *)&out[b][m] + (first + g) * 16, &eight, 32);
                }
        }
}

#else

// Adds to every row's sum four unsigned activations times the row's four signed weights.
#ifdef WIDE
inline void add_products(Ints &sum, int32_t four, Ints w) {
    sum = (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), (__m512i)w);
}
#else
inline void add_products(Ints &sum, int32_t four, Ints w) {
    for (int c = 0; c < QUAD; ++c) sum += (four >> (8 * c) & 255) * ((w << (24 - 8 * c)) >> 24);
}
#endif

template <int B, int M> inline void dots(const Layer &a, int64_t tile, const Code *x, Ints (*sum)[M]) {
    const int64_t size = a.quads * VECTOR, stride = a.quads * QUAD;
    const int8_t *w = a.codes + tile * size;
    UNROLL for (int b = 0; b < B; ++b)
        UNROLL for (int m = 0; m < M; ++m) sum[b][m] = load<Ints>(a.start + (tile + b) * ROWS);
    for (const Code *end = x + stride; x < end; x += QUAD, w += VECTOR) {
        Ints q[B];
        UNROLL for (int b = 0; b < B; ++b) q[b] = load<Ints>(w + b * size);
        UNROLL for (int m = 0; m < M; ++m) {
            const int32_t four = load<int32_t>(x + m * stride);
            UNROLL for (int b = 0; b < B; ++b) add_products(sum[b][m], four, q[b]);
        }
    }
}

// One token: a tile is one stream, four sums along it.
template <> inline void dots<1, 1>(const Layer &a, int64_t tile, const Code *x, Ints (*out)[1]) {
    const int8_t *w = a.codes + tile * a.quads * VECTOR;
    Ints sum[4] = {load<Ints>(a.start + tile * ROWS)};
    int64_t k = 0;
    for (; k + 4 <= a.quads; k += 4)
        UNROLL for (int u = 0; u < 4; ++u, x += QUAD, w += VECTOR) {
            __builtin_prefetch(w + AHEAD);
            add_products(sum[u], load<int32_t>(x), load<Ints>(w));
        }
    for (; k < a.quads; ++k, x += QUAD, w += VECTOR) add_products(sum[0], load<int32_t>(x), load<Ints>(w));
    out[0][0] = sum[0] + sum[1] + sum[2] + sum[3];
}

#endif

template <int B, int M> inline void add_beside(const Layer &a, int64_t tile, const float *x, Lanes (*value)[M]) {
    const uint16_t *row = a.beside + tile * ROWS;
    for (int64_t n = 0; n < a.besides; ++n, row += a.tiles * ROWS) {
        Lanes w[B];
        UNROLL for (int b = 0; b < B; ++b) w[b] = lanes(row + b * ROWS);
        UNROLL for (int m = 0; m < M; ++m)
            UNROLL for (int b = 0; b < B; ++b) value[b][m] += w[b] * x[m * a.besides + n];
    }
}

void add_odd(const Layer &a, int64_t tile, const std::vector<Odd> &odd, Lanes &value) {
    Lanes sum = {};
    for (const Odd &one : odd) {
        const Ints four = load<Ints>(a.codes + (tile * a.quads + one.column / QUAD) * VECTOR);
        sum += one.value * __builtin_convertvector((four << (24 - one.column % QUAD * 8)) >> 24, Lanes);
    }
    value += sum * load<Lanes>(a.scale + tile * ROWS);
}

inline void put(float *y, const Lanes &value, int64_t count) { std::memcpy(y, &value, count * 4); }
inline void put(uint16_t *y, const Lanes &value, int64_t count) {
    uint16_t half[ROWS];
    for (int i = 0; i < ROWS; ++i) {
        const uint32_t bits = bits_of(value[i]);
        half[i] = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
    std::memcpy(y, half, count * 2);
}

template <int B, int M, class T>
void tiles_times(const Layer &a, int64_t tile, const Tokens &t, int64_t first, T *y) {
    Ints sum[B][M];
    dots<B, M>(a, tile, t.codes.data() + first * a.quads * QUAD, sum);
    Lanes value[B][M];
    for (int b = 0; b < B; ++b) {
        const Lanes scale = load<Lanes>(a.scale + (tile + b) * ROWS), bias = load<Lanes>(a.bias + (tile + b) * ROWS);
        for (int m = 0; m < M; ++m)
            value[b][m] = __builtin_convertvector(sum[b][m], Lanes) * (t.step[first + m] * scale) + bias;
    }
    if (a.besides) add_beside<B, M>(a, tile, t.beside.data() + first * a.besides, value);
    for (int b = 0; b < B; ++b) {
        const int64_t row = (tile + b) * ROWS, count = std::min<int64_t>(ROWS, a.rows - row);
        for (int m = 0; m < M; ++m) {
            if (!t.odd[first + m].empty()) add_odd(a, tile + b, t.odd[first + m], value[b][m]);
            put(y + (first + m) * a.rows + row, value[b][m], count);
        }
    }
}

template <int M, class T>
void group_times(const Layer &a, int64_t tile, int64_t last, const Tokens &t, int64_t first, T *y) {
    for (; M == 1 && tile < last; ++tile) tiles_times<1, M>(a, tile, t, first, y);
    if (last - tile == 3) tiles_times<3, M>(a, tile, t, first, y);
    if (last - tile == 2) tiles_times<2, M>(a, tile, t, first, y);
    if (last - tile == 1) tiles_times<1, M>(a, tile, t, first, y);
}

template <class T>
void tokens_times(const Layer &a, int64_t tile, int64_t last, const Tokens &t, int64_t count, T *y) {
    int64_t first = 0;
    for (; first + TOKENS <= count; first += TOKENS) group_times<TOKENS>(a, tile, last, t, first, y);
    if (count - first >= 4) group_times<4>(a, tile, last, t, first, y), first += 4;
    if (count - first == 3) group_times<3>(a, tile, last, t, first, y);
    if (count - first == 2) group_times<2>(a, tile, last, t, first, y);
    if (count - first == 1) group_times<1>(a, tile, last, t, first, y);
}

// Codes of `count` tokens, in room of this thread's own.
template <class T> Tokens &prepared(const Layer &a, const T *x, int64_t count) {
    static thread_local Tokens t;
    const int64_t stride = a.quads * QUAD;
    if (int64_t(t.codes.size()) < count * stride) t.codes.resize(count * stride);
    if (int64_t(t.beside.size()) < count * a.besides) t.beside.resize(count * a.besides);
    if (int64_t(t.step.size()) < count) t.step.resize(count), t.odd.resize(count);
    for (int64_t m = 0; m < count; ++m) {
        float *beside = t.beside.data() + m * a.besides;
        t.step[m] = quantized(a, x + m * a.width, t.codes.data() + m * stride, beside, t.odd[m]);
    }
    return t;
}

template <class T> void alone(const Layer &a, const T *x, T *y, int64_t count) {
    for (int64_t first = 0; first < count; first += CHUNK) {
        const int64_t now = std::min<int64_t>(CHUNK, count - first);
        const Tokens &t = prepared(a, x + first * a.width, now);
        for (int64_t tile = 0; tile < a.tiles; tile += 3)
            tokens_times(a, tile, std::min(a.tiles, tile + 3), t, now, y + first * a.rows);
    }
}

// Many tokens are shared out among the threads, of few tokens the tiles: threads meet once, at the end.
template <class T> void linear(const Layer &a, const T *x, T *y, int64_t count, int threads) {
    if (threads < 2) return alone(a, x, y, count);
    if (count < TOKENS * threads) {
        const Tokens &t = prepared(a, x, count);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t tile = 0; tile < a.tiles; tile += 3)
            tokens_times(a, tile, std::min(a.tiles, tile + 3), t, count, y);
        return;
    }
    const int64_t share = (count + threads - 1) / threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < count; first += share)
        alone(a, x + first * a.width, y + first * a.rows, std::min(share, count - first));
}

}  // namespace

extern "C" {
// y (count, rows) of x (count, width), both float (half 0) or bfloat16 (half 1). `start`, `scale`, `bias` and the rows
// of `beside` have 16 tiles entries. `limit` counts only without `columns`.
void int8_linear(const Layer *a, const void *x, void *y, int64_t count, int half, int threads) {
    if (half) linear(*a, (const uint16_t *)x, (uint16_t *)y, count, threads);
    else linear(*a, (const float *)x, (float *)y, count, threads);
}
}
