// Matrix times vector that reads only the part of a matrix an input needs: bfloat16 weights, float32 sums.
//
// With AVX-512 or AVX2 two groups of bfloat16 are widened by a shift and a mask; -DPLAIN compiles the loops for others.
// A matrix is stored so that what is skipped is one run of bytes: by input (`columns`, [in][out]) where inputs are
// skipped, by neuron ([neurons][width]) where neurons are. Sums run over the kept places in their order, whatever the
// number of threads: outputs are divided among threads, never sums. A NaN is never skipped.
// Rows of activations are float32 or bfloat16 (`half`), results likewise; each row keeps its own places.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(PLAIN)
#elif defined(__AVX512F__)
#include <immintrin.h>
#define WIDE 16
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define WIDE 8
#endif

typedef uint16_t bf16;
typedef int64_t num;
typedef std::vector<float> Floats;

static inline float widen(bf16 v) { uint32_t b = uint32_t(v) << 16; float f; memcpy(&f, &b, 4); return f; }
static inline uint32_t bits(float f) { uint32_t b; memcpy(&b, &f, 4); return b; }
static inline bf16 narrow(float f) {
  uint32_t b = bits(f);
  if ((b & 0x7fffffff) > 0x7f800000) return bf16(b >> 16 | 0x40);
  return bf16((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
static void read_row(const void* x, int half, num row, num n, float* to) {
  if (!half) { memcpy(to, (const float*)x + row * n, n * sizeof(float)); return; }
  const bf16* from = (const bf16*)x + row * n;
  for (num i = 0; i < n; ++i) to[i] = widen(from[i]);
}
static void write_part(void* y, int half, num row, num n, num begin, num end, const float* from) {
  if (!half) { memcpy((float*)y + row * n + begin, from + begin, (end - begin) * sizeof(float)); return; }
  bf16* to = (bf16*)y + row * n;
  for (num i = begin; i < end; ++i) to[i] = narrow(from[i]);
}

// Two arrangements of a vector of floats that make a load of 32 bfloat16 one shift and one mask: every 32 values, first
// the 16 at even places and then the 16 at odd ones. What is left over after whole groups of 32 stays as it is.
static void spread(const float* from, num n, float* to) {
  num full = n & ~num(31);
  for (num b = 0; b < full; b += 32)
    for (num i = 0; i < 16; ++i) to[b + i] = from[b + 2 * i], to[b + 16 + i] = from[b + 2 * i + 1];
  for (num i = full; i < n; ++i) to[i] = from[i];
}
static void gathered(const float* from, num begin, num end, float* to) {
  num full = begin + ((end - begin) & ~num(31));
  for (num b = begin; b < full; b += 32)
    for (num i = 0; i < 16; ++i) to[b + 2 * i] = from[b + i], to[b + 2 * i + 1] = from[b + 16 + i];
  for (num i = full; i < end; ++i) to[i] = from[i];
}

struct Kept { std::vector<int> place; Floats value; num count = 0; };

// Places whose value is larger than the threshold, or, `sizes`, whose size is.
static void keep(const float* score, const float* value, num n, float threshold, bool sizes, Kept& out) {
  out.place.resize(n + 16), out.value.resize(n + 16), out.count = 0;
  if (sizes && !(threshold > 0)) threshold = 0;
  const uint32_t least = bits(threshold), mask = sizes ? 0x7fffffff : 0xffffffff;
  num i = 0, c = 0;
#if WIDE == 16
  const __m512i low = _mm512_set1_epi32(int(least)), cut = _mm512_set1_epi32(int(mask)), top = _mm512_set1_epi32(0x7f800000);
  const __m512i size = _mm512_set1_epi32(0x7fffffff), step = _mm512_set1_epi32(16);
  const __m512 limit = _mm512_set1_ps(threshold);
  __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= n; i += 16, place = _mm512_add_epi32(place, step)) {
    const __m512i b = _mm512_loadu_si512(score + i);
    const __mmask16 nan = _mm512_cmpgt_epi32_mask(_mm512_and_epi32(b, size), top);
    const __mmask16 yes = nan | (sizes ? _mm512_cmpgt_epi32_mask(_mm512_and_epi32(b, cut), low)
                                       : _mm512_cmp_ps_mask(_mm512_castsi512_ps(b), limit, _CMP_GT_OQ));
    _mm512_mask_compressstoreu_epi32(out.place.data() + c, yes, place);
    _mm512_mask_compressstoreu_ps(out.value.data() + c, yes, _mm512_loadu_ps(value + i));
    c += __builtin_popcount(yes);
  }
#endif
  int* place_to = out.place.data();
  float* value_to = out.value.data();
  for (; i < n; ++i) {
    const uint32_t b = bits(score[i]);
    const bool nan = (b & 0x7fffffff) > 0x7f800000, yes = sizes ? (b & mask) > least : score[i] > threshold;
    place_to[c] = int(i), value_to[c] = value[i], c += nan | yes;  // no branch: half of them would be mispredicted
  }
  out.count = c;
}

#if WIDE == 8
static inline __m256i load_pairs(const bf16* at) { return _mm256_loadu_si256((const __m256i*)at); }
static inline __m256 evens(__m256i w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)); }
static inline __m256 odds(__m256i w) {
  return _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(int(0xffff0000))));
}
static inline float total(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#endif

// sum[o] += sum_k value[k] * w[place[k]][o] for begin <= o < end; whole groups of 32 outputs are left `spread`.
static const int TOGETHER = 8;
template <int N>
static inline void add_rows(const bf16* const* row, const bf16* const* next, const float* value, num begin, num end, float* sum) {
  num o = begin;
#if WIDE == 16
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  __m512 v[N];
  for (int k = 0; k < N; ++k) v[k] = _mm512_set1_ps(value[k]);
  for (; o + 32 <= end; o += 32) {
    __m512 even = _mm512_loadu_ps(sum + o), odd = _mm512_loadu_ps(sum + o + 16);
    for (int k = 0; k < N; ++k) {
      const __m512i w = _mm512_loadu_si512(row[k] + o);
      if (next) _mm_prefetch((const char*)(next[k] + o), _MM_HINT_T0);
      even = _mm512_fmadd_ps(v[k], _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), even);
      odd = _mm512_fmadd_ps(v[k], _mm512_castsi512_ps(_mm512_and_si512(w, high)), odd);
    }
    _mm512_storeu_ps(sum + o, even), _mm512_storeu_ps(sum + o + 16, odd);
  }
#elif WIDE == 8
  __m256 v[N];
  for (int k = 0; k < N; ++k) v[k] = _mm256_set1_ps(value[k]);
  for (; o + 32 <= end; o += 32) {
    if (next) for (int k = 0; k < N; ++k) _mm_prefetch((const char*)(next[k] + o), _MM_HINT_T0);
    for (num p = o; p < o + 16; p += 8) {
      __m256 even = _mm256_loadu_ps(sum + p), odd = _mm256_loadu_ps(sum + p + 16);
      for (int k = 0; k < N; ++k) {
        const __m256i w = load_pairs(row[k] + 2 * p - o);
        even = _mm256_fmadd_ps(v[k], evens(w), even), odd = _mm256_fmadd_ps(v[k], odds(w), odd);
      }
      _mm256_storeu_ps(sum + p, even), _mm256_storeu_ps(sum + p + 16, odd);
    }
  }
#else
  for (; o + 32 <= end; o += 32)
    for (int k = 0; k < N; ++k)
      for (num i = 0; i < 16; ++i) {
        sum[o + i] += value[k] * widen(row[k][o + 2 * i]);
        sum[o + 16 + i] += value[k] * widen(row[k][o + 2 * i + 1]);
      }
#endif
  for (; o < end; ++o)
    for (int k = 0; k < N; ++k) sum[o] += value[k] * widen(row[k][o]);
}
static void add_kept(const Kept& kept, const bf16* w, num stride, num begin, num end, float* sum) {
  const bf16 *row[TOGETHER], *next[TOGETHER];
  num k = 0;
  for (; k + TOGETHER <= kept.count; k += TOGETHER) {
    const bool more = k + 2 * TOGETHER <= kept.count;
    for (int i = 0; i < TOGETHER; ++i) {
      row[i] = w + kept.place[k + i] * stride;
      if (more) next[i] = w + kept.place[k + TOGETHER + i] * stride;
    }
    add_rows<TOGETHER>(row, more ? next : nullptr, kept.value.data() + k, begin, end, sum);
  }
  for (; k < kept.count; ++k) row[0] = w + kept.place[k] * stride, add_rows<1>(row, nullptr, kept.value.data() + k, begin, end, sum);
}

// out[i] = product of row i of bfloat16 with a `spread` vector. Several rows at once keep several lines of memory on
// their way and several sums apart.
static const int ABREAST = 8;
template <int N>
static inline void dots(const bf16* const* row, const bf16* const* next, const float* x, num n, float* out) {
  num i = 0;
#if WIDE == 16
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  __m512 even[N], odd[N];
  for (int k = 0; k < N; ++k) even[k] = odd[k] = _mm512_setzero_ps();
  for (; i + 32 <= n; i += 32) {
    const __m512 x0 = _mm512_loadu_ps(x + i), x1 = _mm512_loadu_ps(x + i + 16);
    for (int k = 0; k < N; ++k) {
      const __m512i v = _mm512_loadu_si512(row[k] + i);
      if (next) _mm_prefetch((const char*)(next[k] + i), _MM_HINT_T0);
      even[k] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), x0, even[k]);
      odd[k] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(v, high)), x1, odd[k]);
    }
  }
  for (int k = 0; k < N; ++k) out[k] = _mm512_reduce_add_ps(_mm512_add_ps(even[k], odd[k]));
#elif WIDE == 8
  __m256 sum[N] = {};
  for (; i + 32 <= n; i += 32) {
    if (next) for (int k = 0; k < N; ++k) _mm_prefetch((const char*)(next[k] + i), _MM_HINT_T0);
    for (num p = i; p < i + 16; p += 8) {
      const __m256 x0 = _mm256_loadu_ps(x + p), x1 = _mm256_loadu_ps(x + p + 16);
      for (int k = 0; k < N; ++k) {
        const __m256i w = load_pairs(row[k] + 2 * p - i);
        sum[k] = _mm256_fmadd_ps(odds(w), x1, _mm256_fmadd_ps(evens(w), x0, sum[k]));
      }
    }
  }
  for (int k = 0; k < N; ++k) out[k] = total(sum[k]);
#else
  for (int k = 0; k < N; ++k) out[k] = 0;
  for (; i + 32 <= n; i += 32)
    for (int k = 0; k < N; ++k)
      for (num j = 0; j < 16; ++j)
        out[k] += widen(row[k][i + 2 * j]) * x[i + j] + widen(row[k][i + 2 * j + 1]) * x[i + 16 + j];
#endif
  for (; i < n; ++i)
    for (int k = 0; k < N; ++k) out[k] += widen(row[k][i]) * x[i];
}
// out[k] for begin <= k < end: the product of row place[k] (row k where there are no places) of w with x.
static void dot_rows(const bf16* w, const int* place, num begin, num end, const float* x, num n, float* out) {
  const bf16 *row[ABREAST], *next[ABREAST];
  num k = begin;
  for (; k + ABREAST <= end; k += ABREAST) {
    const bool more = k + 2 * ABREAST <= end;
    for (int i = 0; i < ABREAST; ++i) {
      row[i] = w + (place ? place[k + i] : k + i) * n;
      if (more) next[i] = w + (place ? place[k + ABREAST + i] : k + ABREAST + i) * n;
    }
    dots<ABREAST>(row, more ? next : nullptr, x, n, out + k);
  }
  for (; k < end; ++k) row[0] = w + (place ? place[k] : k) * n, dots<1>(row, nullptr, x, n, out + k);
}

// e^v to a few units in the last place, in operations a compiler turns into vectors (a call of expf it does not).
static inline float exponential(float v) {
  v = v < -87.0f ? -87.0f : v > 88.0f ? 88.0f : v;
  const float n = std::floor(v * 1.44269504f + 0.5f), r = v - n * 0.693147181f;
  const float p = 1 + r * (1 + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (0.00833333333f + r * 0.00138888889f)))));
  const uint32_t b = uint32_t(int32_t(n) + 127) << 23;
  float power;
  memcpy(&power, &b, 4);
  return p * power;
}
enum { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3 };
static inline float silu(float v) { return v / (1 + exponential(-v)); }
static inline float activated(float v, int kind) {
  if (kind == SILU) return silu(v);
  if (kind == GELU_TANH) return v / (1 + exponential(-1.5957691216f * (v + 0.044715f * v * v * v)));
  if (kind == GELU) return 0.5f * v * (1 + std::erf(v * 0.70710678f));
  return v > 0 || v != v ? v : 0;
}
static void activate(float* v, num begin, num end, int kind) {
  if (kind == SILU) for (num i = begin; i < end; ++i) v[i] = silu(v[i]);
  else for (num i = begin; i < end; ++i) v[i] = activated(v[i], kind);
}

// This thread's part of n outputs, in whole groups of 32.
struct Part { num begin, end; };
static Part part_of(num n, num unit = 32) {
  num thread = 0, threads = 1;
#ifdef _OPENMP
  thread = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
  const num groups = (n + unit - 1) / unit;
  const num begin = groups * thread / threads * unit, end = groups * (thread + 1) / threads * unit;
  return {begin < n ? begin : n, end < n ? end : n};
}
static Floats& scratch(int which, num n) {
  static thread_local Floats kept[8];
  if (num(kept[which].size()) < n) kept[which].resize(n);
  return kept[which];
}
static Kept& kept_places() { static thread_local Kept kept; return kept; }

extern "C" {

// y[r] = sum over j with |x[r][j]| > threshold of x[r][j] * w[j][:] + bias. Returns how many inputs were kept.
num gather_linear(const void* x, int half, num rows, num in, float threshold, const bf16* w, num out, const float* bias,
                  void* y, int threads) {
  float *row = scratch(0, in).data(), *sum = scratch(1, out).data(), *result = scratch(2, out).data();
  Kept& kept = kept_places();
  num count = 0;
  for (num r = 0; r < rows; ++r) {
    read_row(x, half, r, in, row);
    keep(row, row, in, threshold, true, kept);
    count += kept.count;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const Part own = part_of(out);
      memset(sum + own.begin, 0, (own.end - own.begin) * sizeof(float));
      add_kept(kept, w, out, own.begin, own.end, sum);
      gathered(sum, own.begin, own.end, result);
      if (bias) for (num o = own.begin; o < own.end; ++o) result[o] += bias[o];
      write_part(y, half, r, out, own.begin, own.end, result);
    }
  }
  return count;
}

// A gated feed-forward whose inputs and neurons are kept by size. gate_up is [width][2 ffn], gate first; down is
// [ffn][width]. kept[0] and kept[1] grow by the inputs and neurons kept.
void gather_ffn(const void* x, int half, num rows, num width, num ffn, const bf16* gate_up, const bf16* down, int kind,
                float threshold, float threshold_down, void* y, int threads, num* kept_counts) {
  float *row = scratch(0, width).data(), *sum = scratch(1, 2 * ffn).data(), *both = scratch(2, 2 * ffn).data();
  float *out = scratch(3, width).data(), *result = scratch(4, width).data();
  Kept &inputs = kept_places();
  static thread_local Kept neurons_of_caller;
  Kept &neurons = neurons_of_caller;
  for (num r = 0; r < rows; ++r) {
    read_row(x, half, r, width, row);
    keep(row, row, width, threshold, true, inputs);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const Part mid = part_of(ffn), own = part_of(width);
      for (num shift = 0; shift <= ffn; shift += ffn) {
        memset(sum + shift + mid.begin, 0, (mid.end - mid.begin) * sizeof(float));
        add_kept(inputs, gate_up, 2 * ffn, shift + mid.begin, shift + mid.end, sum);
        gathered(sum, shift + mid.begin, shift + mid.end, both);
      }
      activate(both, mid.begin, mid.end, kind);
      for (num i = mid.begin; i < mid.end; ++i) both[i] *= both[ffn + i];
#pragma omp barrier
#pragma omp single
      keep(both, both, ffn, threshold_down, true, neurons);
      memset(out + own.begin, 0, (own.end - own.begin) * sizeof(float));
      add_kept(neurons, down, width, own.begin, own.end, out);
      gathered(out, own.begin, own.end, result);
      write_part(y, half, r, width, own.begin, own.end, result);
    }
    kept_counts[0] += inputs.count, kept_counts[1] += neurons.count;
  }
}

// A gated feed-forward of which only some neurons are computed. gate, up and down are [ffn][width].
// rank = 0: those with |activation(gate_i x)| > threshold; gate is read whole.
// rank > 0: those a predictor scores above the threshold: (reduce x) expand + offset, reduce [rank][width], expand
// [rank][ffn]. Returns how many neurons were kept.
num neuron_ffn(const void* x, int half, num rows, num width, num ffn, const bf16* gate, const bf16* up, const bf16* down,
               int kind, float threshold, num rank, const bf16* reduce, const bf16* expand, const float* offset, void* y,
               int threads) {
  float *row = scratch(0, width).data(), *in = scratch(1, width).data(), *score = scratch(2, ffn).data();
  float *out = scratch(3, width).data(), *result = scratch(4, width).data(), *low = scratch(5, rank).data();
  float *ups = scratch(6, ffn).data(), *sum = scratch(7, ffn).data();
  static thread_local Kept chosen_of_caller, low_of_caller;
  Kept &kept = chosen_of_caller, &lows = low_of_caller;
  num count = 0;
  for (num r = 0; r < rows; ++r) {
    read_row(x, half, r, width, row);
    spread(row, width, in);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const Part mid = part_of(ffn), own = part_of(width);
      if (rank) {
        const Part few = part_of(rank, 1);
        dot_rows(reduce, nullptr, few.begin, few.end, in, width, low);
#pragma omp barrier
#pragma omp single
        keep(low, low, rank, 0, true, lows);
        memset(sum + mid.begin, 0, (mid.end - mid.begin) * sizeof(float));
        add_kept(lows, expand, ffn, mid.begin, mid.end, sum);
        gathered(sum, mid.begin, mid.end, score);
        for (num i = mid.begin; i < mid.end; ++i) score[i] += offset[i];
      } else {
        dot_rows(gate, nullptr, mid.begin, mid.end, in, width, score);
        activate(score, mid.begin, mid.end, kind);
      }
#pragma omp barrier
#pragma omp single
      keep(score, score, ffn, threshold, rank == 0, kept);
      const Part mine = part_of(kept.count, 1);
      const int* place = kept.place.data();
      float* value = kept.value.data();
      dot_rows(up, place, mine.begin, mine.end, in, width, ups);
      if (rank) {
        dot_rows(gate, place, mine.begin, mine.end, in, width, value);
        activate(value, mine.begin, mine.end, kind);
      }
      for (num k = mine.begin; k < mine.end; ++k) value[k] *= ups[k];
#pragma omp barrier
      memset(out + own.begin, 0, (own.end - own.begin) * sizeof(float));
      add_kept(kept, down, width, own.begin, own.end, out);
      gathered(out, own.begin, own.end, result);
      write_part(y, half, r, width, own.begin, own.end, result);
    }
    count += kept.count;
  }
  return count;
}

}
