#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "operator_checks.h"
#include "cuda/launch.cuh"
#include "cuda/sheets.h"
#include "cuda/types.cuh"

namespace l2rw {
namespace cuda {
namespace {

// Runs of `inner` numbers, `threads.down` of them at a time.
template <class T, int Count>
__global__ void __launch_bounds__(kSheetThreads) scale(
    const T* __restrict__ g,  // [n, outer, inner]
    SheetStrides strides,
    const __grid_constant__ Either weights,  // [n]
    const int64_t* __restrict__ active,      // [k]
    int64_t active_stride,
    int64_t examples,
    int64_t runs,  // k * outer
    int64_t outer,
    int64_t inner,
    T* __restrict__ scaled) {  // [k, outer, inner]
  using A = accumulation_t<T>;
  const int64_t run = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (run >= runs) {
    return;
  }
  const int64_t example = active[run / outer * active_stride];
  CUDA_KERNEL_ASSERT(example >= 0 && example < examples);
  const A weight = weights.load<T, A>(example);
  const T* const from = g + example * strides.example + run % outer * strides.outer;
  T* const to = scaled + run * inner;
  for (int64_t k = int64_t{threadIdx.x} * Count; k < inner; k += int64_t{blockDim.x} * Count) {
    auto pack = *reinterpret_cast<const Pack<T, Count>*>(from + k * strides.inner);
#pragma unroll
    for (int e = 0; e < Count; ++e) {
      pack.values[e] = static_cast<T>(weight * static_cast<A>(pack.values[e]));
    }
    *reinterpret_cast<Pack<T, Count>*>(to + k) = pack;
  }
}

Tensor scale_rows(const Tensor& g, const Tensor& weights, const Tensor& active) {
  check_scale_rows(g, weights, active);
  const Launch launch("scale_rows", g);
  const int64_t k = active.size(0);
  // The dimension that lies side by side in g does so in the result: no transposition on the way.
  const bool by_channel = g.stride(1) == 1 && g.stride(2) != 1;
  const int64_t outer = g.size(by_channel ? 2 : 1);
  const int64_t inner = g.size(by_channel ? 1 : 2);
  const SheetStrides strides{
      g.stride(0), g.stride(by_channel ? 2 : 1), g.stride(by_channel ? 1 : 2)};
  Tensor scaled = torch::stable::new_empty(g, {k, outer, inner});
  if (scaled.numel() > 0) {
    dispatch_device_type(g.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      constexpr int kCount = kWidest<T>;
      const bool vectors =
          fits_vectors(reinterpret_cast<uint64_t>(g.data_ptr()), sizeof(T), strides, inner, kCount);
      const SheetThreads threads = sheet_threads(inner / (vectors ? kCount : 1));
      launch.run(
          vectors ? &scale<T, kCount> : &scale<T, 1>,
          ceil_div(k * outer, threads.down),
          dim3(static_cast<unsigned>(threads.across), static_cast<unsigned>(threads.down)),
          0,
          static_cast<const T*>(data<T>(g)),
          strides,
          either(weights, g.scalar_type()),
          static_cast<const int64_t*>(data<int64_t>(active)),
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
}  // namespace cuda

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) { m.impl("scale_rows", TORCH_BOX(&cuda::scale_rows)); }

}  // namespace l2rw
