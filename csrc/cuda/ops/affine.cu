#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "cuda/reduce/block.cuh"
#include "cuda/reduce/partial_sums.cuh"
#include "cuda/reduce/segments.h"
#include "cuda/util/integers.h"
#include "cuda/util/launch.cuh"
#include "cuda/util/strides.h"
#include "cuda/util/types.cuh"
#include "cuda/util/vectors.h"
#include "layout.h"
#include "operator_checks.h"

namespace l2rw::cuda {
namespace {

// A mean or a factor in the accumulation dtype, broadcast to an example. It is absent if data is
// null.
template <class A>
struct Broadcast {
  const A* data;
  Strides strides;
};

template <class T>
struct Operands {
  const T* x;
  Strides x_strides;
  const T* g;
  Strides g_strides;
  Broadcast<accumulation_t<T>> mean;
  Broadcast<accumulation_t<T>> rstd;
  int64_t outer;
  int64_t inner;
};

template <class T, int Count>
__device__ __forceinline__ void load(const T* from, T (&values)[Count]) {
  const auto vector = *reinterpret_cast<const Vector<T, Count>*>(from);
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    values[k] = vector.values[k];
  }
}

// Count elements of a broadcast along the inner dimension.
template <class A, int Count>
__device__ __forceinline__ void load_broadcast(
    const Broadcast<A>& broadcast,
    int64_t example,
    int64_t outer,
    int64_t inner,
    A absent,
    A (&values)[Count]) {
  const A* const from = broadcast.data + example * broadcast.strides.example +
                        outer * broadcast.strides.outer + inner * broadcast.strides.inner;
  if (broadcast.data != nullptr && broadcast.strides.inner == 1 && Count * sizeof(A) % 16 == 0) {
    constexpr int kStep = Count * sizeof(A) % 16 == 0 ? 16 / sizeof(A) : 1;
#pragma unroll
    for (int k = 0; k < Count; k += kStep) {
      const auto vector = *reinterpret_cast<const Vector<A, kStep>*>(from + k);
#pragma unroll
      for (int e = 0; e < kStep; ++e) {
        values[k + e] = vector.values[e];
      }
    }
    return;
  }
  const bool shared = broadcast.data == nullptr || broadcast.strides.inner == 0;
  const A first = broadcast.data == nullptr ? absent : *from;
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    values[k] = shared ? first : from[k * broadcast.strides.inner];
  }
}

// g and g x^ at Count elements.
template <class T, int Count>
__device__ __forceinline__ void load_products(
    const Operands<T>& operands,
    int64_t example,
    int64_t outer,
    int64_t inner,
    accumulation_t<T> (&gradients)[Count],
    accumulation_t<T> (&products)[Count]) {
  using A = accumulation_t<T>;
  T x[Count];
  T g[Count];
  A mean[Count];
  A rstd[Count];
  load(
      operands.x + example * operands.x_strides.example + outer * operands.x_strides.outer +
          inner * operands.x_strides.inner,
      x);
  load(
      operands.g + example * operands.g_strides.example + outer * operands.g_strides.outer +
          inner * operands.g_strides.inner,
      g);
  load_broadcast(operands.mean, example, outer, inner, A(0), mean);
  load_broadcast(operands.rstd, example, outer, inner, A(1), rstd);
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    gradients[k] = static_cast<A>(g[k]);
    products[k] = gradients[k] * ((static_cast<A>(x[k]) - mean[k]) * rstd[k]);
  }
}

// Sums over the outer dimension. Each thread with y = 0 writes G_i and Gb_i of Count channels. For
// sm_86, ptxas would limit itself to 40 registers and spill if it were not told that two blocks are
// enough.
template <class T, int Count>
__global__ void __launch_bounds__(kBlockThreads, 2) sum_outer(
    const __grid_constant__ Operands<T> operands,
    Segments segments,
    unsigned channel_blocks,
    int64_t examples,
    accumulation_t<T>* __restrict__ partial,         // [segments, n, d]
    accumulation_t<T>* __restrict__ partial_bias) {  // [segments, n, d]
  using A = accumulation_t<T>;
  __shared__ A sums[2][kBlockThreads][Count];
  const int64_t example = blockIdx.x / channel_blocks / segments.count;
  const int64_t segment = blockIdx.x / channel_blocks % segments.count;
  const Range range = segments.range(segment, operands.outer);
  const int64_t inner = (int64_t{blockIdx.x % channel_blocks} * blockDim.x + threadIdx.x) * Count;
  A gradient[Count] = {};
  A bias_gradient[Count] = {};
  if (inner < operands.inner) {
    for (int64_t outer = range.begin + threadIdx.y; outer < range.end; outer += blockDim.y) {
      A gradients[Count];
      A products[Count];
      load_products(operands, example, outer, inner, gradients, products);
#pragma unroll
      for (int k = 0; k < Count; ++k) {
        gradient[k] += products[k];
        bias_gradient[k] += gradients[k];
      }
    }
  }
  const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    sums[0][thread][k] = gradient[k];
    sums[1][thread][k] = bias_gradient[k];
  }
  __syncthreads();
  if (threadIdx.y == 0 && inner < operands.inner) {
    for (unsigned y = 1; y < blockDim.y; ++y) {
#pragma unroll
      for (int k = 0; k < Count; ++k) {
        gradient[k] += sums[0][y * blockDim.x + threadIdx.x][k];
        bias_gradient[k] += sums[1][y * blockDim.x + threadIdx.x][k];
      }
    }
    const int64_t to = (segment * examples + example) * operands.inner + inner;
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      partial[to + k] = gradient[k];
      partial_bias[to + k] = bias_gradient[k];
    }
  }
}

// Sums over the inner dimension. A warp takes one channel of one example.
template <class T, int Count>
__global__ void __launch_bounds__(kBlockThreads) sum_inner(
    const __grid_constant__ Operands<T> operands,
    int64_t examples,
    accumulation_t<T>* __restrict__ sums,         // [n, d]
    accumulation_t<T>* __restrict__ bias_sums) {  // [n, d]
  using A = accumulation_t<T>;
  constexpr int kWarps = kBlockThreads / 32;
  const int64_t channel = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t count = examples * operands.outer;
  if (channel >= count) {
    return;  // the whole warp
  }
  const int64_t example = channel / operands.outer;
  const int64_t outer = channel % operands.outer;
  A gradient = 0;
  A bias_gradient = 0;
  for (int64_t inner = threadIdx.x % 32 * Count; inner < operands.inner; inner += 32 * Count) {
    A gradients[Count];
    A products[Count];
    load_products(operands, example, outer, inner, gradients, products);
    A terms = 0;
    A bias_terms = 0;
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      terms += products[k];
      bias_terms += gradients[k];
    }
    gradient += terms;
    bias_gradient += bias_terms;
  }
  gradient = warp_sum<32>(gradient);
  bias_gradient = warp_sum<32>(bias_gradient);
  if (threadIdx.x % 32 == 0) {
    sums[channel] = gradient;
    bias_sums[channel] = bias_gradient;
  }
}

// The strides along examples, the outer and the inner dimension, zero along one element. The inner
// dimension are the channels, or with `by_channel` false the positions.
Strides strides_of(const Tensor& tensor, bool by_channel) {
  const auto stride = [&](int64_t d) { return tensor.size(d) == 1 ? 0 : tensor.stride(d); };
  return {stride(0), stride(by_channel ? 1 : 2), stride(by_channel ? 2 : 1)};
}

template <class A>
Broadcast<A> broadcast(const OptionalTensor& tensor, bool by_channel) {
  return {data<A>(tensor), tensor ? strides_of(*tensor, by_channel) : Strides{0, 0, 0}};
}

// Whether x and g, and what has a number for each inner element, can be read in the widest vectors.
template <class T>
bool fits_widest(const Operands<T>& operands) {
  const auto fits = [&](const auto* data, Strides strides) {
    return fits_vectors(data, strides, operands.inner, kVectorElements<T>);
  };
  const auto fits_broadcast = [&](const Broadcast<accumulation_t<T>>& broadcast) {
    return broadcast.data == nullptr || broadcast.strides.inner != 1 ||
           fits(broadcast.data, broadcast.strides);
  };
  return fits(operands.x, operands.x_strides) && fits(operands.g, operands.g_strides) &&
         fits_broadcast(operands.mean) && fits_broadcast(operands.rstd);
}

std::tuple<Tensor, Tensor> affine_example_gradients(
    const Tensor& x, const Tensor& g, const OptionalTensor& mean, const OptionalTensor& rstd) {
  check_affine_example_gradients(x, g, mean, rstd);
  const Launch launch("affine_example_gradients", x);
  const int64_t n = x.size(0);
  const int64_t channels = x.size(2);
  const ScalarType accumulation = accumulation_dtype(x.scalar_type());
  Tensor gradients = torch::stable::new_empty(x, {n, channels}, accumulation);
  Tensor bias_gradients = torch::stable::new_empty(x, {n, channels}, accumulation);
  if (x.numel() == 0) {
    return {torch::stable::zero_(gradients), torch::stable::zero_(bias_gradients)};
  }
  const OptionalTensor shift = in_accumulation_dtype(mean);
  const OptionalTensor factor = in_accumulation_dtype(rstd);
  // The inner dimension are the channels, unless only the positions of x are contiguous.
  const bool by_channel = x.stride(2) == 1 || channels == 1 || x.stride(1) != 1;
  const int64_t outer = x.size(by_channel ? 1 : 2);
  const int64_t inner = x.size(by_channel ? 2 : 1);
  dispatch_device_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulation_t<T>;
    Operands<T> operands{
        data<T>(x),
        strides_of(x, by_channel),
        data<T>(g),
        strides_of(g, by_channel),
        broadcast<A>(shift, by_channel),
        broadcast<A>(factor, by_channel),
        outer,
        inner};
    if (inner == 1) {  // one element is contiguous
      operands.x_strides.inner = operands.g_strides.inner = 1;
    }
    const bool vectors = fits_widest(operands);
    if (!by_channel) {
      launch.run(
          vectors ? &sum_inner<T, kVectorElements<T>> : &sum_inner<T, 1>,
          ceil_div(n * channels, kBlockThreads / 32),
          kBlockThreads,
          0,
          operands,
          n,
          data<A>(gradients),
          data<A>(bias_gradients));
      return;
    }
    const int64_t inner_vectors = channels / (vectors ? kVectorElements<T> : 1);
    const BlockShape block = block_shape(inner_vectors);
    const int64_t channel_blocks = ceil_div(inner_vectors, block.x);
    const Segments segments = segments_of(n * channel_blocks, outer, block, launch.processors());
    const auto form = [&](const Tensor& partial, const Tensor& partial_bias) {
      launch.run(
          vectors ? &sum_outer<T, kVectorElements<T>> : &sum_outer<T, 1>,
          n * segments.count * channel_blocks,
          dim3(static_cast<unsigned>(block.x), static_cast<unsigned>(block.y)),
          0,
          operands,
          segments,
          static_cast<unsigned>(channel_blocks),
          n,
          data<A>(partial),
          data<A>(partial_bias));
    };
    form_in_parts(launch, segments.count, form, gradients, bias_gradients);
  });
  return {gradients, bias_gradients};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) {
  m.impl("affine_example_gradients", TORCH_BOX(&affine_example_gradients));
}

}  // namespace l2rw::cuda
