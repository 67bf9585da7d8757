#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "cuda/reduce/segments.h"
#include "cuda/util/integers.h"
#include "cuda/util/launch.cuh"
#include "cuda/util/strides.h"
#include "cuda/util/types.cuh"
#include "cuda/util/vectors.h"
#include "operator_checks.h"

namespace l2rw::cuda {
namespace {

// Scales rows of `inner` elements. A block takes one for each of its threads along y.
template <class T, int Count>
__global__ void __launch_bounds__(kBlockThreads) scale(
    const T* __restrict__ g,  // [n, outer, inner]
    Strides strides,
    const __grid_constant__ EitherDtype weights,  // [n]
    const int64_t* __restrict__ active,           // [k]
    int64_t active_stride,
    int64_t examples,
    int64_t rows,  // k * outer
    int64_t outer,
    int64_t inner,
    T* __restrict__ scaled) {  // [k, outer, inner]
  using A = accumulation_t<T>;
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= rows) {
    return;
  }
  const int64_t example = active[row / outer * active_stride];
  CUDA_KERNEL_ASSERT(example >= 0 && example < examples);
  const A weight = weights.load<T, A>(example);
  const T* const from = g + example * strides.example + row % outer * strides.outer;
  T* const to = scaled + row * inner;
  for (int64_t k = int64_t{threadIdx.x} * Count; k < inner; k += int64_t{blockDim.x} * Count) {
    auto vector = *reinterpret_cast<const Vector<T, Count>*>(from + k * strides.inner);
#pragma unroll
    for (int e = 0; e < Count; ++e) {
      vector.values[e] = static_cast<T>(weight * static_cast<A>(vector.values[e]));
    }
    *reinterpret_cast<Vector<T, Count>*>(to + k) = vector;
  }
}

Tensor scale_rows(const Tensor& g, const Tensor& weights, const Tensor& active) {
  check_scale_rows(g, weights, active);
  const Launch launch("scale_rows", g);
  const int64_t k = active.size(0);
  // The dimension that is contiguous in g is so in the result, and nothing is transposed.
  const bool by_channel = g.stride(1) == 1 && g.stride(2) != 1;
  const int64_t outer = g.size(by_channel ? 2 : 1);
  const int64_t inner = g.size(by_channel ? 1 : 2);
  const Strides strides{g.stride(0), g.stride(by_channel ? 2 : 1), g.stride(by_channel ? 1 : 2)};
  Tensor scaled = torch::stable::new_empty(g, {k, outer, inner});
  if (scaled.numel() > 0) {
    dispatch_device_type(g.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      constexpr int kCount = kVectorElements<T>;
      const bool vectors = fits_vectors(data<T>(g), strides, inner, kCount);
      const BlockShape block = block_shape(inner / (vectors ? kCount : 1));
      launch.run(
          vectors ? &scale<T, kCount> : &scale<T, 1>,
          ceil_div(k * outer, block.y),
          dim3(static_cast<unsigned>(block.x), static_cast<unsigned>(block.y)),
          0,
          data<T>(g),
          strides,
          either_dtype(weights, g.scalar_type()),
          data<int64_t>(active),
          active.stride(0),
          g.size(0),
          k * outer,
          outer,
          inner,
          data<T>(scaled));
    });
  }
  return by_channel ? torch::stable::transpose(scaled, 1, 2) : scaled;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) { m.impl("scale_rows", TORCH_BOX(&scale_rows)); }

}  // namespace l2rw::cuda
