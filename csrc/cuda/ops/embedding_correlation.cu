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
#include "operator_checks.h"

namespace l2rw::cuda {
namespace {

struct Index {
  const void* data;
  int64_t example_stride;
  int64_t position_stride;
  bool narrow;  // int32, not int64

  __device__ int64_t load(int64_t example, int64_t position) const {
    const int64_t k = example * example_stride + position * position_stride;
    return narrow ? static_cast<const int32_t*>(data)[k] : static_cast<const int64_t*>(data)[k];
  }
};

// The terms of u_i at a segment of the positions. V is the type of the direction.
template <class T, class V, int Count>
__global__ void __launch_bounds__(kBlockThreads) correlate(
    const __grid_constant__ Index index,  // [n, T]
    const T* __restrict__ g,              // [n, T, d]
    Strides g_strides,
    const V* __restrict__ direction,  // [v, d]
    int64_t row_stride,
    int64_t column_stride,
    int64_t vocabulary,
    int64_t positions,
    int64_t width,
    Segments segments,
    int64_t examples,
    accumulation_t<T>* __restrict__ partial) {  // [segments, n]
  using A = accumulation_t<T>;
  const int64_t example = blockIdx.x / segments.count;
  const int64_t segment = blockIdx.x % segments.count;
  const Range range = segments.range(segment, positions);
  A sum = 0;
  for (int64_t t = range.begin + threadIdx.y; t < range.end; t += blockDim.y) {
    const int64_t row = index.load(example, t);
    // As in torch's embedding: the host could look only by waiting for the device, and a row that
    // does not exist has no value.
    CUDA_KERNEL_ASSERT(row >= 0 && row < vocabulary);
    for (int64_t c = int64_t{threadIdx.x} * Count; c < width; c += int64_t{blockDim.x} * Count) {
      const auto gradients = *reinterpret_cast<const Vector<T, Count>*>(
          g + example * g_strides.example + t * g_strides.outer + c * g_strides.inner);
      const auto factors = *reinterpret_cast<const Vector<V, Count>*>(
          direction + row * row_stride + c * column_stride);
      A terms = 0;
#pragma unroll
      for (int k = 0; k < Count; ++k) {
        terms += static_cast<A>(gradients.values[k]) * static_cast<A>(factors.values[k]);
      }
      sum += terms;
    }
  }
  sum = block_sum<kBlockThreads>(sum);
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    partial[segment * examples + example] = sum;
  }
}

Tensor embedding_correlation(const Tensor& index, const Tensor& g, const Tensor& direction) {
  check_embedding_correlation(index, g, direction);
  const Launch launch("embedding_correlation", g);
  const ScalarType dtype = g.scalar_type();
  const int64_t n = g.size(0);
  const int64_t positions = g.size(1);
  const int64_t width = g.size(2);
  Tensor u = torch::stable::new_empty(g, {n}, accumulation_dtype(dtype));
  if (g.numel() == 0) {
    return torch::stable::zero_(u);
  }
  const Index rows{
      index.data_ptr(), index.stride(0), index.stride(1), index.scalar_type() == ScalarType::Int};
  const Strides strides{g.stride(0), g.stride(1), g.stride(2)};
  dispatch_device_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulation_t<T>;
    const auto run = [&](auto direction_zero) {
      using V = decltype(direction_zero);
      // V is at least as wide as T, so that 16 bytes hold fewer numbers of it.
      constexpr int kCount = kVectorElements<V>;
      const bool vectors =
          fits_vectors(data<T>(g), strides, width, kCount) &&
          fits_vectors(
              data<V>(direction), {0, direction.stride(0), direction.stride(1)}, width, kCount);
      const BlockShape block = block_shape(width / (vectors ? kCount : 1));
      const Segments segments = segments_of(n, positions, block, launch.processors());
      sum_parts_of_rows(launch, segments.count, n, 1, u, [&](const Tensor& partial) {
        launch.run(
            vectors ? &correlate<T, V, kCount> : &correlate<T, V, 1>,
            n * segments.count,
            dim3(static_cast<unsigned>(block.x), static_cast<unsigned>(block.y)),
            0,
            rows,
            data<T>(g),
            strides,
            data<V>(direction),
            direction.stride(0),
            direction.stride(1),
            direction.size(0),
            positions,
            width,
            segments,
            n,
            data<A>(partial));
      });
    };
    if (direction.scalar_type() == dtype) {
      run(T{});
    } else {
      run(A{});
    }
  });
  return u;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) {
  m.impl("embedding_correlation", TORCH_BOX(&embedding_correlation));
}

}  // namespace l2rw::cuda
