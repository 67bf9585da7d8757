// Only headers whose inline functions are inlined or internal: another instruction set's copy of a
// function that the linker merges would run on processors that lack it.

#include "cpu/isa/kernels.h"

#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own _mm512_reduce_add_ps starts from an undefined vector.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace l2rw::L2RW_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int64_t kRowsByVectors[kMaxVectors + 1] = {0, 16, 12, 8, 0};
constexpr int64_t kPlanarRowsByVectors[kMaxVectors + 1] = {0, 6, 6, 6, 6};
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int64_t kRowsByVectors[kMaxVectors + 1] = {0, 12, 6, 4, 0};
constexpr int64_t kPlanarRowsByVectors[kMaxVectors + 1] = {0, 3, 3, 3, 3};
#else
constexpr int kVectorBytes = 16;
constexpr int64_t kRowsByVectors[kMaxVectors + 1] = {0, 12, 6, 4, 0};
constexpr int64_t kPlanarRowsByVectors[kMaxVectors + 1] = {0, 3, 3, 3, 3};
#endif

template <class T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);

template <class T>
struct VectorOf {
  typedef T aligned __attribute__((vector_size(kVectorBytes)));
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::aligned;

template <class T>
inline Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::type*>(from);
}

template <class T>
inline void store(T* to, Vector<T> value) {
  *reinterpret_cast<typename VectorOf<T>::type*>(to) = value;
}

template <class T>
inline T horizontal_sum(Vector<T> value) {
  T sum = 0;
  for (int64_t l = 0; l < kLanes<T>; ++l) {
    sum += value[l];
  }
  return sum;
}

#if defined(__AVX512F__)
template <>
inline float horizontal_sum<float>(Vector<float> value) {
  return _mm512_reduce_add_ps(value);
}
template <>
inline double horizontal_sum<double>(Vector<double> value) {
  return _mm512_reduce_add_pd(value);
}
#elif defined(__AVX2__)
template <>
inline float horizontal_sum<float>(Vector<float> value) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#endif

template <class T, int R, int V>
T channel_tile(
    const T* a, const T* const* b, const PixelRows<T>& pixels, const TileResult<T>& result) {
  constexpr int64_t L = kLanes<T>;
  Vector<T> sum[R][V] = {};
  const int64_t step_a = pixels.step_a;
  const int64_t step_b = pixels.step_b;
  const char* soon = pixels.soon;
  for (int64_t row = 0; row < pixels.count; ++row) {
    for (const char* end = soon + pixels.soon_bytes; soon < end; soon += 64) {
      __builtin_prefetch(soon, 0, 3);
    }
    const T* x = a + pixels.a[row];
    const T* y[V];
    for (int v = 0; v < V; ++v) {
      y[v] = b[v] + pixels.b[row];
    }
    int64_t offset = 0;
    for (int64_t w = 0; w < pixels.width; ++w, x += step_a, offset += step_b) {
      Vector<T> vector[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        vector[v] = load(y[v] + offset);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          sum[r][v] += x[r] * vector[v];
        }
      }
    }
  }
  if (result.out != nullptr) {
    T* out = result.out;
    if (result.add) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          store(out + r * result.ld + v * L, load(out + r * result.ld + v * L) + sum[r][v]);
        }
      }
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          store(out + r * result.ld + v * L, sum[r][v]);
        }
      }
    }
  }
  if (result.direction == nullptr) {
    return 0;
  }
  Vector<T> total[V] = {};
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      total[v] += sum[r][v] * load(result.direction + r * result.ld + v * L);
    }
  }
  for (int v = 1; v < V; ++v) {
    total[0] += total[v];
  }
  return horizontal_sum<T>(total[0]);
}

template <class T, int R, int V>
void row_tile(const T* a, int64_t lda, const T* b, int64_t depth, T* out, int64_t ldo) {
  constexpr int64_t L = kLanes<T>;
  Vector<T> sum[R][V] = {};
  const T* x[R];
  for (int r = 0; r < R; ++r) {
    x[r] = a + r * lda;
  }
  for (int64_t k = 0; k < depth; ++k, b += V * L) {
    Vector<T> vector[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      vector[v] = load(b + v * L);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        sum[r][v] += x[r][k] * vector[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      T* to = out + r * ldo + v * L;
      store(to, load(to) + sum[r][v]);
    }
  }
}

template <class T, int R, int V>
T planar_tile(
    const T* a, int64_t lda, const T* const* b, int64_t length, const TileResult<T>& result) {
  Vector<T> sum[R][V] = {};
  const T* y[V];
  for (int v = 0; v < V; ++v) {
    y[v] = b[v];
  }
  for (int64_t s = 0; s < length; s += kLanes<T>) {
    Vector<T> vector[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      vector[v] = load(y[v] + s);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector<T> x = load(a + r * lda + s);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        sum[r][v] += x * vector[v];
      }
    }
  }
  if (result.out != nullptr) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        T& out = result.out[r * result.ld + v];
        out = (result.add ? out : T(0)) + horizontal_sum<T>(sum[r][v]);
      }
    }
  }
  if (result.direction == nullptr) {
    return 0;
  }
  Vector<T> total[V] = {};
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      total[v] += sum[r][v] * result.direction[r * result.ld + v];
    }
  }
  for (int v = 1; v < V; ++v) {
    total[0] += total[v];
  }
  return horizontal_sum<T>(total[0]);
}

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// IEEE half precision without a conversion instruction: shift exponent and mantissa into place and
// rescale the exponent by a product, which also normalises subnormal numbers.
inline float from_half(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  if (magnitude >= 0x7c00u) {  // infinity and NaN
    return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  const float scaled = from_bits(magnitude << 13) * from_bits(0x77800000u);  // 2^112
  return (sign != 0) ? -scaled : scaled;
}

template <class T>
inline T element_at(const void* from, ScalarType dtype, int64_t index) {
  switch (dtype) {
    case ScalarType::Double:
      return static_cast<T>(static_cast<const double*>(from)[index]);
    case ScalarType::Float:
      return static_cast<T>(static_cast<const float*>(from)[index]);
    case ScalarType::BFloat16:
      return static_cast<T>(
          from_bits(static_cast<uint32_t>(static_cast<const uint16_t*>(from)[index]) << 16));
    default:
      return static_cast<T>(from_half(static_cast<const uint16_t*>(from)[index]));
  }
}

#if defined(__AVX512F__)
// A 16 x 16 block of which `rows` x `columns` numbers are there.
inline void transpose_block(
    float* to,
    int64_t to_row,
    const float* from,
    int64_t from_row,
    int64_t rows,
    int64_t columns,
    float scale) {
  const __mmask16 column_mask = static_cast<__mmask16>((1u << columns) - 1);
  const __mmask16 row_mask = static_cast<__mmask16>((1u << rows) - 1);
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    r[i] = i < rows ? _mm512_mul_ps(factor, _mm512_maskz_loadu_ps(column_mask, from + i * from_row))
                    : _mm512_setzero_ps();
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(t[i + j]), high = _mm512_castps_pd(t[i + j + 2]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // r[4 q + j] holds, in its 128-bit lane k, rows 4q..4q+3 of column 4k + j.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 low02 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
    const __m512 low13 = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
    const __m512 high02 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const __m512 high13 = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(low02, high02, 0x88);
    t[4 + j] = _mm512_shuffle_f32x4(low13, high13, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(low02, high02, 0xdd);
    t[12 + j] = _mm512_shuffle_f32x4(low13, high13, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i < columns) {
      _mm512_mask_storeu_ps(to + i * to_row, row_mask, t[i]);
    }
  }
}
#elif defined(__AVX2__)
// An 8 x 8 block of which `rows` x `columns` numbers are there. Masked stores are slow on some
// processors: partial blocks go number by number.
inline void transpose_block(
    float* to,
    int64_t to_row,
    const float* from,
    int64_t from_row,
    int64_t rows,
    int64_t columns,
    float scale) {
  if (rows < 8 || columns < 8) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        to[j * to_row + i] = scale * from[i * from_row + j];
      }
    }
    return;
  }
  const __m256 factor = _mm256_set1_ps(scale);
  __m256 r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm256_mul_ps(factor, _mm256_loadu_ps(from + i * from_row));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(to + j * to_row, _mm256_permute2f128_ps(r[j], r[4 + j], 0x20));
    _mm256_storeu_ps(to + (4 + j) * to_row, _mm256_permute2f128_ps(r[j], r[4 + j], 0x31));
  }
}
#endif

template <class T>
inline void copy_scaled(T* to, const T* from, int64_t size, T scale) {
  constexpr int64_t L = kLanes<T>;
  if (size < L) {
    for (int64_t i = 0; i < size; ++i) {
      to[i] = scale * from[i];
    }
    return;
  }
  for (int64_t i = 0; i < size - L; i += L) {
    store(to + i, scale * load(from + i));
  }
  store(to + size - L, scale * load(from + size - L));  // overlaps the one before
}

template <class T>
void transpose(
    T* to,
    int64_t to_row,
    const void* from,
    ScalarType dtype,
    int64_t from_row,
    int64_t from_column,
    int64_t rows,
    int64_t columns,
    T scale) {
  if (dtype == kDtype<T> && (from_row == 1 || (rows == 1 && to_row == 1 && from_column == 1))) {
    // Already in the order of the result.
    const T* source = static_cast<const T*>(from);
    const int64_t lines = from_row == 1 ? columns : 1;
    const int64_t size = from_row == 1 ? rows : columns;
    for (int64_t j = 0; j < lines; ++j) {
      copy_scaled(to + j * to_row, source + j * from_column, size, scale);
    }
    return;
  }
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    if (dtype == kDtype<T> && from_column == 1) {
      const T* source = static_cast<const T*>(from);
      constexpr int64_t L = kLanes<T>;
      for (int64_t i = 0; i < rows; i += L) {
        for (int64_t j = 0; j < columns; j += L) {
          transpose_block(
              to + j * to_row + i,
              to_row,
              source + i * from_row + j,
              from_row,
              rows - i < L ? rows - i : L,
              columns - j < L ? columns - j : L,
              scale);
        }
      }
      return;
    }
  }
#endif
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      to[j * to_row + i] = scale * element_at<T>(from, dtype, i * from_row + j * from_column);
    }
  }
}

template <class T>
T sum(const T* a, int64_t size) {
  constexpr int64_t L = kLanes<T>;
  Vector<T> sums = {};
  int64_t i = 0;
  for (; i + L <= size; i += L) {
    sums += load(a + i);
  }
  T total = horizontal_sum<T>(sums);
  for (; i < size; ++i) {
    total += a[i];
  }
  return total;
}

template <class T>
T dot(const T* a, const T* b, int64_t size) {
  constexpr int64_t L = kLanes<T>;
  Vector<T> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= size; i += 4 * L) {
    for (int v = 0; v < 4; ++v) {
      sum[v] += load(a + i + v * L) * load(b + i + v * L);
    }
  }
  for (; i + L <= size; i += L) {
    sum[0] += load(a + i) * load(b + i);
  }
  T total = horizontal_sum<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < size; ++i) {
    total += a[i] * b[i];
  }
  return total;
}

template <class T>
void column_sums(const T* a, int64_t lda, int64_t rows, int64_t columns, T* out) {
  constexpr int64_t L = kLanes<T>;
  int64_t c = 0;
  for (; c + L <= columns; c += L) {
    Vector<T> sum[4] = {};
    int64_t p = 0;
    for (; p + 4 <= rows; p += 4) {
      for (int v = 0; v < 4; ++v) {
        sum[v] += load(a + (p + v) * lda + c);
      }
    }
    for (; p < rows; ++p) {
      sum[0] += load(a + p * lda + c);
    }
    store(out + c, load(out + c) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
  for (; c < columns; ++c) {
    T sum = 0;
    for (int64_t p = 0; p < rows; ++p) {
      sum += a[p * lda + c];
    }
    out[c] += sum;
  }
}

// The tiles of R rows that are V vectors wide, where the registers hold their sums.
template <class T, int V, int R>
constexpr void fill_tiles(Kernels<T>& kernels) {
  if constexpr (R <= kRowsByVectors[V]) {
    kernels.channel_tile[V][R] = &channel_tile<T, R, V>;
    if constexpr (R <= kMaxRowTile) {
      kernels.row_tile[V][R] = &row_tile<T, R, V>;
    }
  }
  if constexpr (R <= kPlanarRowsByVectors[V]) {
    kernels.planar_tile[V][R] = &planar_tile<T, R, V>;
  }
}

template <class T, int V, int... R>
constexpr void fill(Kernels<T>& kernels, std::integer_sequence<int, R...>) {
  (fill_tiles<T, V, R + 1>(kernels), ...);
  kernels.max_rows[V] = kRowsByVectors[V];
  kernels.max_planar_rows[V] = kPlanarRowsByVectors[V];
}

template <class T>
constexpr Kernels<T> make_kernels() {
  Kernels<T> kernels{};
  const auto rows = std::make_integer_sequence<int, kMaxRows>{};
  fill<T, 1>(kernels, rows);
  fill<T, 2>(kernels, rows);
  fill<T, 3>(kernels, rows);
  fill<T, 4>(kernels, rows);
  kernels.lanes = kLanes<T>;
  kernels.transpose = &transpose<T>;
  kernels.sum = &sum<T>;
  kernels.dot = &dot<T>;
  kernels.column_sums = &column_sums<T>;
  return kernels;
}

}  // namespace

template <class T>
const Kernels<T>& kernels() {
  static constexpr Kernels<T> kKernels = make_kernels<T>();
  return kKernels;
}

template const Kernels<float>& kernels();
template const Kernels<double>& kernels();

}  // namespace l2rw::L2RW_ISA
