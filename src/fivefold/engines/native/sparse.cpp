// Products with matrices of which only the nonzero weights are stored: y = W x, x and y in float32 or bfloat16.
//
//   mask     uint32 (rows, words)   bit j % 32 of word j / 32 says whether column j is stored; words = ceil(columns / 32)
//   values   bfloat16 (stored + 32) the stored weights, row after row in the order of the columns, then 32 that pad
//   offsets  int64 (rows + 1)       where each row begins in `values`
//
// AVX-512 VBMI2: 32 weights are spread to their columns by one instruction (vpexpandw). With inputs in bfloat16 one
// more multiplies and adds pairs of them (vdpbf16ps, AVX-512 BF16). With inputs in float32 the weights are widened: a
// bfloat16 is the upper half of a float32, so the even columns are a shift and the odd ones a mask away, and the input
// is laid out so beforehand, of every 32 columns the 16 even ones and then the 16 odd ones.
//
// AVX2: a byte of the mask is looked up in a table for vpshufb, which spreads 8 weights and widens them to float32 at
// once. Elsewhere, and with -DPLAIN, set bits are taken one by one. Sums are in float32.

#include <cstdint>
#include <cstring>
#include <vector>
#if defined(PLAIN)
#elif defined(__AVX512VBMI2__) && defined(__AVX512BW__)
#include <immintrin.h>
#define EXPAND 1
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define LOOKUP 1
#endif

namespace {

constexpr int AT_ONCE = 4;   // inputs that share one reading of a row
constexpr int AHEAD = 4096;  // bytes: past the page, where the processor does not look ahead by itself

float widened(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

uint16_t narrowed(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#ifdef EXPAND

__m512i spread(uint32_t mask, const uint16_t*& at) {
    __m512i w = _mm512_loadu_si512(at);
    __asm__("" : "+v"(w));  // spreading straight from memory is slower
    _mm_prefetch(reinterpret_cast<const char*>(at) + AHEAD, _MM_HINT_T0);
    at += __builtin_popcount(mask);
    return _mm512_maskz_expand_epi16(mask, w);
}

template <int N>
void add(__m512i w, const float* x, int64_t stride, __m512* sums) {
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000))));
    for (int n = 0; n < N; n++) {
        sums[2 * n] = _mm512_fmadd_ps(even, _mm512_loadu_ps(x + n * stride), sums[2 * n]);
        sums[2 * n + 1] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + n * stride + 16), sums[2 * n + 1]);
    }
}

#ifdef __AVX512BF16__
template <int N>
void add(__m512i w, const uint16_t* x, int64_t stride, __m512* sums) {
    for (int n = 0; n < N; n++) {
        const __m512i in = _mm512_loadu_si512(x + n * stride);
        sums[2 * n] = _mm512_dpbf16_ps(sums[2 * n], (__m512bh)w, (__m512bh)in);
    }
}
#endif

template <int N, typename X>
void dot(const uint32_t* mask, const uint16_t* at, const X* x, int words, int64_t stride, float* out) {
    __m512 first[2 * N], second[2 * N];
    for (int k = 0; k < 2 * N; k++) first[k] = second[k] = _mm512_setzero_ps();
    int word = 0;
    for (; word + 1 < words; word += 2) {
        const __m512i a = spread(mask[word], at), b = spread(mask[word + 1], at);
        add<N>(a, x + word * 32, stride, first);
        add<N>(b, x + word * 32 + 32, stride, second);
    }
    if (word < words) add<N>(spread(mask[word], at), x + word * 32, stride, first);
    for (int n = 0; n < N; n++)
        out[n] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(first[2 * n], first[2 * n + 1]),
                                                    _mm512_add_ps(second[2 * n], second[2 * n + 1])));
}

#elif defined(LOOKUP)

// For every byte of a mask, where vpshufb finds the four bytes of each of 8 float32 in 8 packed bfloat16.
struct Places {
    alignas(32) uint8_t of[256][32];
    Places() {
        std::memset(of, 0x80, sizeof of);
        for (int byte = 0; byte < 256; byte++)
            for (int j = 0, n = 0; j < 8; j++)
                if (byte >> j & 1) of[byte][4 * j + 2] = uint8_t(2 * n), of[byte][4 * j + 3] = uint8_t(2 * n++ + 1);
    }
};
const Places places;

inline __m256 spread(uint32_t byte, const uint16_t* at) {
    const __m256i w = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    const __m256i place = _mm256_load_si256(reinterpret_cast<const __m256i*>(places.of[byte]));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(w, place));
}

float total(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

void store(__m256 w, void* out, int64_t to, int half) {
    if (!half) return _mm256_storeu_ps(static_cast<float*>(out) + to, w);
    const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(w), 16);
    const __m128i eight = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(out) + to), eight);
}

template <int N>
void dot(const uint32_t* mask, const uint16_t* at, const float* x, int words, int64_t stride, float* out) {
    constexpr int APART = N == 4 ? 2 : 4;
    __m256 sums[N][APART] = {};
    for (int word = 0; word < words; word++, x += 32) {
        const uint32_t bits = mask[word];
        _mm_prefetch(reinterpret_cast<const char*>(at) + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) {
            const uint32_t before = bits & ((uint64_t(1) << 8 * part) - 1);
            const __m256 w = spread(bits >> 8 * part & 255, at + __builtin_popcount(before));
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                __m256& sum = sums[n][part % APART];
                sum = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + n * stride + 8 * part), sum);
            }
        }
        at += __builtin_popcount(bits);
    }
    for (int n = 0; n < N; n++) {
        __m256 sum = _mm256_add_ps(sums[n][0], sums[n][1]);
        if (APART == 4) sum = _mm256_add_ps(sum, _mm256_add_ps(sums[n][APART - 2], sums[n][APART - 1]));
        out[n] = total(sum);
    }
}

#else

template <int N>
void dot(const uint32_t* mask, const uint16_t* at, const float* x, int words, int64_t stride, float* out) {
    float sums[N] = {};
    for (int word = 0; word < words; word++)
        for (uint32_t bits = mask[word]; bits; bits &= bits - 1) {
            const int column = __builtin_ctz(bits);
            const float w = widened(*at++);
            const float* place = x + word * 32 + (column & 1) * 16 + column / 2;
            for (int n = 0; n < N; n++) sums[n] += w * place[n * stride];
        }
    std::memcpy(out, sums, sizeof sums);
}

#endif

void put(uint16_t* to, float value) { *to = narrowed(value); }
void put(float* to, float value) { *to = value; }
float read(uint16_t value) { return widened(value); }
float read(float value) { return value; }

template <typename X>
void lay_out(const X* x, int columns, float* out) {
#ifdef LOOKUP
    for (int j = 0; j < columns; j++) out[j] = read(x[j]);
#else
    for (int j = 0; j < columns; j++) out[j / 32 * 32 + (j & 1) * 16 + j % 32 / 2] = read(x[j]);
#endif
}

template <typename X, typename Y>
void product(const uint32_t* mask, const uint16_t* values, const int64_t* offsets, const X* x, Y* y, int64_t rows,
             int words, int inputs, int threads) {
    const int64_t stride = int64_t(words) * 32;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const uint32_t* own = mask + row * words;
        const uint16_t* at = values + offsets[row];
        float sums[AT_ONCE];
        for (int n = 0; n < inputs;) {
            const int some = inputs - n >= AT_ONCE ? AT_ONCE : inputs - n >= 2 ? 2 : 1;
            const X* in = x + n * stride;
            if (some == AT_ONCE) dot<AT_ONCE>(own, at, in, words, stride, sums);
            else if (some == 2) dot<2>(own, at, in, words, stride, sums);
            else dot<1>(own, at, in, words, stride, sums);
            for (int k = 0; k < some; k++) put(y + int64_t(n + k) * rows + row, sums[k]);
            n += some;
        }
    }
}

}  // namespace

extern "C" {

// Fills `offsets`; the number of stored weights, or -1 when a bit is set for a column that is not there.
int64_t sparse_offsets(const uint32_t* mask, int64_t rows, int columns, int64_t* offsets) {
    const int words = (columns + 31) / 32, rest = columns % 32;
    const uint32_t beyond = rest ? ~((1u << rest) - 1) : 0;
    int64_t at = 0;
    for (int64_t row = 0; row < rows; row++) {
        offsets[row] = at;
        for (int word = 0; word < words; word++) at += __builtin_popcount(mask[row * words + word]);
        if (mask[row * words + words - 1] & beyond) return -1;
    }
    offsets[rows] = at;
    return at;
}

// y (inputs, rows) = x (inputs, columns) W^T; `half` says that x and y are bfloat16 and not float32.
void sparse_product(const uint32_t* mask, const uint16_t* values, const int64_t* offsets, const void* x, void* y,
                    int64_t rows, int columns, int inputs, int half, int threads) {
    const int words = (columns + 31) / 32;
    const int64_t stride = int64_t(words) * 32;
#if defined(EXPAND) && defined(__AVX512BF16__)
    if (half) {
        static thread_local std::vector<uint16_t> kept;
        kept.assign(size_t(stride) * inputs, 0);
        for (int n = 0; n < inputs; n++)
            std::memcpy(kept.data() + n * stride, static_cast<const uint16_t*>(x) + int64_t(n) * columns, columns * 2);
        product(mask, values, offsets, kept.data(), static_cast<uint16_t*>(y), rows, words, inputs, threads);
        return;
    }
#endif
    static thread_local std::vector<float> kept;
    kept.assign(size_t(stride) * inputs, 0.0f);
    for (int n = 0; n < inputs; n++) {
        const int64_t from = int64_t(n) * columns;
        float* to = kept.data() + n * stride;
        if (half) lay_out(static_cast<const uint16_t*>(x) + from, columns, to);
        else lay_out(static_cast<const float*>(x) + from, columns, to);
    }
    if (half) product(mask, values, offsets, kept.data(), static_cast<uint16_t*>(y), rows, words, inputs, threads);
    else product(mask, values, offsets, kept.data(), static_cast<float*>(y), rows, words, inputs, threads);
}

// The dense matrix, (rows, columns) in bfloat16 or float32.
void sparse_unpack(const uint32_t* mask, const uint16_t* values, const int64_t* offsets, void* out, int64_t rows,
                   int columns, int half, int threads) {
    const int words = (columns + 31) / 32;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t* at = values + offsets[row];
        for (int word = 0; word < words; word++) {
            const uint32_t bits = mask[row * words + word];
            const int64_t to = row * columns + word * 32;
            const int here = columns - word * 32 < 32 ? columns - word * 32 : 32;
#ifdef EXPAND
            const __m512i w = spread(bits, at);
            if (half) {
                _mm512_mask_storeu_epi16(static_cast<uint16_t*>(out) + to, uint32_t((uint64_t(1) << here) - 1), w);
                continue;
            }
            const __m512i low = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(w)), 16);
            const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(w, 1)), 16);
            float* place = static_cast<float*>(out) + to;
            _mm512_mask_storeu_epi32(place, uint16_t((uint64_t(1) << (here < 16 ? here : 16)) - 1), low);
            if (here > 16) _mm512_mask_storeu_epi32(place + 16, uint16_t((uint64_t(1) << (here - 16)) - 1), high);
#else
            int j = 0;
#ifdef LOOKUP
            for (; j + 8 <= here; j += 8) {
                const uint32_t byte = bits >> j & 255;
                store(spread(byte, at), out, to + j, half);
                at += __builtin_popcount(byte);
            }
#endif
            for (; j < here; j++) {
                const uint16_t w = bits >> j & 1 ? *at++ : uint16_t(0);
                if (half) static_cast<uint16_t*>(out)[to + j] = w;
                else static_cast<float*>(out)[to + j] = widened(w);
            }
#endif
        }
    }
}

}
