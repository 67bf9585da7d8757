// Compiled once per instruction set: see cmake/InstructionSets.cmake.

#include "cpu/isa/row_kernels.h"

#include <bit>

namespace l2rw::L2RW_ISA {
namespace {

// Conversions to the accumulation type that a compiler vectorises.
inline double load(double value) { return value; }
inline float load(float value) { return value; }
inline float load(BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.x) << 16);
}
inline float load(Half value) {
#ifdef __F16C__
  return static_cast<float>(std::bit_cast<_Float16>(value.x));
#else
  return static_cast<float>(value);
#endif
}

// And back, rounding to nearest even.
inline void store(double* to, double value) { *to = value; }
inline void store(float* to, float value) { *to = value; }
inline void store(BFloat16* to, float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->x = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}
inline void store(Half* to, float value) {
#ifdef __F16C__
  to->x = std::bit_cast<uint16_t>(static_cast<_Float16>(value));
#else
  *to = static_cast<Half>(value);
#endif
}

// The channels of one position lie side by side: the gradient of all channels is built up position
// by position. `kPerChannel`: mean and rstd differ from channel to channel.
template <class T, bool kPerChannel>
void affine_by_position(
    const AffineExample<T>& e,
    accumulation_t<T>* __restrict__ gradient,
    accumulation_t<T>* __restrict__ gradient_bias) {
  using A = accumulation_t<T>;
  for (int64_t c = 0; c < e.channels; ++c) {
    gradient[c] = 0;
    gradient_bias[c] = 0;
  }
  for (int64_t t = 0; t < e.positions; ++t) {
    const T* __restrict__ x = e.x + t * e.x_position;
    const T* __restrict__ g = e.g + t * e.g_position;
    const A* __restrict__ mean = e.mean + t * e.mean_position;
    const A* __restrict__ rstd = e.rstd + t * e.rstd_position;
    if constexpr (kPerChannel) {
      const int64_t mean_step = e.mean_channel;
      const int64_t rstd_step = e.rstd_channel;
      if (mean_step == 1 && rstd_step == 1) {
#pragma omp simd
        for (int64_t c = 0; c < e.channels; ++c) {
          const A weight = load(g[c]);
          gradient[c] += weight * (load(x[c]) - mean[c]) * rstd[c];
          gradient_bias[c] += weight;
        }
      } else {
        for (int64_t c = 0; c < e.channels; ++c) {
          const A weight = load(g[c]);
          gradient[c] += weight * (load(x[c]) - mean[c * mean_step]) * rstd[c * rstd_step];
          gradient_bias[c] += weight;
        }
      }
    } else {
      const A shift = *mean;
      const A factor = *rstd;
#pragma omp simd
      for (int64_t c = 0; c < e.channels; ++c) {
        const A weight = load(g[c]);
        gradient[c] += weight * (load(x[c]) - shift) * factor;
        gradient_bias[c] += weight;
      }
    }
  }
}

// The positions of one channel lie side by side, and mean and rstd do not vary along them.
template <class T>
void affine_by_channel(
    const AffineExample<T>& e,
    accumulation_t<T>* __restrict__ gradient,
    accumulation_t<T>* __restrict__ gradient_bias) {
  using A = accumulation_t<T>;
  for (int64_t c = 0; c < e.channels; ++c) {
    const T* __restrict__ x = e.x + c * e.x_channel;
    const T* __restrict__ g = e.g + c * e.g_channel;
    const A shift = e.mean[c * e.mean_channel];
    A sum = 0;
    A sum_bias = 0;
#pragma omp simd reduction(+ : sum, sum_bias)
    for (int64_t t = 0; t < e.positions; ++t) {
      const A weight = load(g[t]);
      sum += weight * (load(x[t]) - shift);
      sum_bias += weight;
    }
    gradient[c] = sum * e.rstd[c * e.rstd_channel];
    gradient_bias[c] = sum_bias;
  }
}

template <class T>
void affine_any(
    const AffineExample<T>& e,
    accumulation_t<T>* __restrict__ gradient,
    accumulation_t<T>* __restrict__ gradient_bias) {
  using A = accumulation_t<T>;
  for (int64_t c = 0; c < e.channels; ++c) {
    A sum = 0;
    A sum_bias = 0;
    for (int64_t t = 0; t < e.positions; ++t) {
      const A weight = load(e.g[t * e.g_position + c * e.g_channel]);
      const A shifted = load(e.x[t * e.x_position + c * e.x_channel]) -
                        e.mean[t * e.mean_position + c * e.mean_channel];
      sum += weight * shifted * e.rstd[t * e.rstd_position + c * e.rstd_channel];
      sum_bias += weight;
    }
    gradient[c] = sum;
    gradient_bias[c] = sum_bias;
  }
}

}  // namespace

template <class T>
void RowKernels<T>::affine_gradient(const AffineExample<T>& e, A* gradient, A* gradient_bias) {
  const bool constant_along_channels = e.mean_channel == 0 && e.rstd_channel == 0;
  const bool constant_along_positions = e.mean_position == 0 && e.rstd_position == 0;
  if (e.x_channel == 1 && e.g_channel == 1) {
    if (constant_along_channels) {
      affine_by_position<T, false>(e, gradient, gradient_bias);
    } else {
      affine_by_position<T, true>(e, gradient, gradient_bias);
    }
  } else if (e.x_position == 1 && e.g_position == 1 && constant_along_positions) {
    affine_by_channel(e, gradient, gradient_bias);
  } else {
    affine_any(e, gradient, gradient_bias);
  }
}

template <class T>
void RowKernels<T>::group_norm_by_channel(const GroupNormBlock<T>& b) {
  // Partial sums bound the rounding error of large images.
  constexpr int64_t kPartial = 4096;
  const A mean = *b.mean;
  const A rstd = *b.rstd;
  A scale_sum = 0;
  A shift_sum = 0;
  for (int64_t c = 0; c < b.channels; ++c) {
    A sum = 0;
    A sum_bias = 0;
    for (int64_t begin = 0; begin < b.positions; begin += kPartial) {
      const T* __restrict__ x = b.x + c * b.positions + begin;
      const T* __restrict__ g = b.g + c * b.positions + begin;
      const int64_t count = b.positions - begin < kPartial ? b.positions - begin : kPartial;
      A part = 0;
      A part_bias = 0;
#pragma omp simd reduction(+ : part, part_bias)
      for (int64_t t = 0; t < count; ++t) {
        const A value = load(g[t]);
        part += value * (load(x[t]) - mean);
        part_bias += value;
      }
      sum += part;
      sum_bias += part_bias;
    }
    b.gradient[c] = sum * rstd;
    b.gradient_bias[c] = sum_bias;
    const A weight = b.weight == nullptr ? A(1) : b.weight[c];
    scale_sum += weight * b.gradient[c];
    shift_sum += weight * sum_bias;
  }
  const A factor = rstd / static_cast<A>(b.channels * b.positions);
  const A slope = -factor * rstd * scale_sum;
  const A offset = -factor * shift_sum;
  for (int64_t c = 0; c < b.channels; ++c) {
    const T* __restrict__ x = b.x + c * b.positions;
    const T* __restrict__ g = b.g + c * b.positions;
    T* __restrict__ to = b.to + c * b.positions;
    const A weight = b.weight == nullptr ? rstd : rstd * b.weight[c];
#pragma omp simd
    for (int64_t t = 0; t < b.positions; ++t) {
      store(to + t, weight * load(g[t]) + (slope * (load(x[t]) - mean) + offset));
    }
  }
}

template <class T>
void RowKernels<T>::group_norm_by_position(const GroupNormBlock<T>& b, A* buffer) {
  const int64_t channels = b.groups * b.channels;
  A* __restrict__ mean = buffer;
  A* __restrict__ weight = buffer + channels;
  A* __restrict__ slope = buffer + 2 * channels;
  A* __restrict__ offset = buffer + 3 * channels;
  A* __restrict__ gradient = b.gradient;
  A* __restrict__ gradient_bias = b.gradient_bias;
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = b.mean[c / b.channels];
    gradient[c] = 0;
    gradient_bias[c] = 0;
  }
  for (int64_t t = 0; t < b.positions; ++t) {
    const T* __restrict__ x = b.x + t * channels;
    const T* __restrict__ g = b.g + t * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const A value = load(g[c]);
      gradient[c] += value * (load(x[c]) - mean[c]);
      gradient_bias[c] += value;
    }
  }
  for (int64_t group = 0; group < b.groups; ++group) {
    const A rstd = b.rstd[group];
    const A factor = rstd / static_cast<A>(b.channels * b.positions);
    const int64_t first = group * b.channels;
    A scale_sum = 0;
    A shift_sum = 0;
    for (int64_t c = first; c < first + b.channels; ++c) {
      const A own = b.weight == nullptr ? A(1) : b.weight[c];
      gradient[c] *= rstd;
      scale_sum += own * gradient[c];
      shift_sum += own * gradient_bias[c];
      weight[c] = own * rstd;
    }
    for (int64_t c = first; c < first + b.channels; ++c) {
      slope[c] = -factor * rstd * scale_sum;
      offset[c] = -factor * shift_sum;
    }
  }
  for (int64_t t = 0; t < b.positions; ++t) {
    const T* __restrict__ x = b.x + t * channels;
    const T* __restrict__ g = b.g + t * channels;
    T* __restrict__ to = b.to + t * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      store(to + c, weight[c] * load(g[c]) + (slope[c] * (load(x[c]) - mean[c]) + offset[c]));
    }
  }
}

template <class T>
void RowKernels<T>::batch_norm_sums_by_channel(const BatchNormBlock<T>& b, A* sum, A* product) {
  const T* __restrict__ x = b.x;
  const T* __restrict__ dx = b.dx;
  const A mean = *b.mean;
  A part = 0;
  A part_product = 0;
#pragma omp simd reduction(+ : part, part_product)
  for (int64_t t = 0; t < b.positions; ++t) {
    const A value = load(dx[t]);
    part += value;
    part_product += value * (load(x[t]) - mean);
  }
  *sum = part;
  *product = part_product;
}

template <class T>
void RowKernels<T>::batch_norm_sums_by_position(
    const BatchNormBlock<T>& b, A* __restrict__ sum, A* __restrict__ product) {
  const A* __restrict__ mean = b.mean;
  for (int64_t c = 0; c < b.channels; ++c) {
    sum[c] = 0;
    product[c] = 0;
  }
  for (int64_t t = 0; t < b.positions; ++t) {
    const T* __restrict__ x = b.x + t * b.channels;
    const T* __restrict__ dx = b.dx + t * b.channels;
#pragma omp simd
    for (int64_t c = 0; c < b.channels; ++c) {
      const A value = load(dx[c]);
      sum[c] += value;
      product[c] += value * (load(x[c]) - mean[c]);
    }
  }
}

template <class T>
void RowKernels<T>::batch_norm_tangent_by_channel(
    const BatchNormBlock<T>& b, const A* scale, const A* slope, const A* offset) {
  const T* __restrict__ x = b.x;
  T* __restrict__ to = b.to;
  const A mean = *b.mean;
  const A factor = *scale;
  const A along = *slope;
  const A constant = *offset;
  if (b.dx == nullptr) {
#pragma omp simd
    for (int64_t t = 0; t < b.positions; ++t) {
      store(to + t, along * (load(x[t]) - mean) + constant);
    }
    return;
  }
  const T* __restrict__ dx = b.dx;
#pragma omp simd
  for (int64_t t = 0; t < b.positions; ++t) {
    store(to + t, factor * load(dx[t]) + (along * (load(x[t]) - mean) + constant));
  }
}

template <class T>
void RowKernels<T>::batch_norm_tangent_by_position(
    const BatchNormBlock<T>& b,
    const A* __restrict__ scale,
    const A* __restrict__ slope,
    const A* __restrict__ offset) {
  const A* __restrict__ mean = b.mean;
  for (int64_t t = 0; t < b.positions; ++t) {
    const T* __restrict__ x = b.x + t * b.channels;
    T* __restrict__ to = b.to + t * b.channels;
    if (b.dx == nullptr) {
#pragma omp simd
      for (int64_t c = 0; c < b.channels; ++c) {
        store(to + c, slope[c] * (load(x[c]) - mean[c]) + offset[c]);
      }
      continue;
    }
    const T* __restrict__ dx = b.dx + t * b.channels;
#pragma omp simd
    for (int64_t c = 0; c < b.channels; ++c) {
      store(to + c, scale[c] * load(dx[c]) + (slope[c] * (load(x[c]) - mean[c]) + offset[c]));
    }
  }
}

template <class T>
template <class V>
accumulation_t<T> RowKernels<T>::dot(
    const T* a, int64_t a_stride, const V* b, int64_t b_stride, int64_t count) {
  A sum = 0;
  if (a_stride == 1 && b_stride == 1) {
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < count; ++c) {
      sum += load(a[c]) * load(b[c]);
    }
  } else {
    for (int64_t c = 0; c < count; ++c) {
      sum += load(a[c * a_stride]) * load(b[c * b_stride]);
    }
  }
  return sum;
}

template <class T>
void RowKernels<T>::scale(
    const T* __restrict__ from, int64_t stride, A weight, T* __restrict__ to, int64_t count) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      store(to + c, weight * load(from[c]));
    }
  } else {
    for (int64_t c = 0; c < count; ++c) {
      store(to + c, weight * load(from[c * stride]));
    }
  }
}

template <class T>
void RowKernels<T>::combine(
    const T* const* from,
    int64_t stride,
    const A* weights,
    int64_t rows,
    A* __restrict__ to,
    int64_t count) {
  for (int64_t c = 0; c < count; ++c) {
    to[c] = 0;
  }
  int64_t r = 0;
  // Four rows a pass: `to` is loaded and stored a quarter as often.
  if (stride == 1) {
    for (; r + 4 <= rows; r += 4) {
      const T* const a = from[r];
      const T* const b = from[r + 1];
      const T* const c = from[r + 2];
      const T* const d = from[r + 3];
      const A wa = weights[r];
      const A wb = weights[r + 1];
      const A wc = weights[r + 2];
      const A wd = weights[r + 3];
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) {
        to[k] += (wa * load(a[k]) + wb * load(b[k])) + (wc * load(c[k]) + wd * load(d[k]));
      }
    }
  }
  for (; r < rows; ++r) {
    const T* const a = from[r];
    const A wa = weights[r];
    if (stride == 1) {
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) {
        to[k] += wa * load(a[k]);
      }
    } else {
      for (int64_t k = 0; k < count; ++k) {
        to[k] += wa * load(a[k * stride]);
      }
    }
  }
}

template struct RowKernels<double>;
template struct RowKernels<float>;
template struct RowKernels<BFloat16>;
template struct RowKernels<Half>;
template double RowKernels<double>::dot(const double*, int64_t, const double*, int64_t, int64_t);
template float RowKernels<float>::dot(const float*, int64_t, const float*, int64_t, int64_t);
template float RowKernels<BFloat16>::dot(
    const BFloat16*, int64_t, const BFloat16*, int64_t, int64_t);
template float RowKernels<BFloat16>::dot(const BFloat16*, int64_t, const float*, int64_t, int64_t);
template float RowKernels<Half>::dot(const Half*, int64_t, const Half*, int64_t, int64_t);
template float RowKernels<Half>::dot(const Half*, int64_t, const float*, int64_t, int64_t);

}  // namespace l2rw::L2RW_ISA
