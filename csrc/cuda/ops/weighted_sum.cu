#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "cuda/reduce/block.cuh"
#include "cuda/reduce/partial_sums.cuh"
#include "cuda/util/integers.h"
#include "cuda/util/launch.cuh"
#include "cuda/util/limits.h"
#include "cuda/util/strides.h"
#include "cuda/util/types.cuh"
#include "cuda/util/vectors.h"
#include "operator_checks.h"

namespace l2rw::cuda {
namespace {

constexpr const char* kOperation = "weighted_sum";
constexpr int kThreads = 256;

// The sum over a part of the examples. A block first lists which of 256 have a weight, in order,
// and never reads the rows of the others.
template <class T, int Count>
__global__ void __launch_bounds__(kThreads) sum_examples(
    const T* __restrict__ gradients,  // [n, *]
    int64_t example_stride,
    const __grid_constant__ StridedLayout layout,  // of one example
    const __grid_constant__ EitherDtype weights,   // [n]
    int64_t examples,
    int64_t count,  // elements of one example
    int64_t column_blocks,
    int64_t parts,
    accumulation_t<T>* __restrict__ partial) {  // [parts, count]
  using A = accumulation_t<T>;
  __shared__ int64_t active[kThreads];
  __shared__ A active_weights[kThreads];
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t part = blockIdx.x / column_blocks;
  const Range range = split_range(examples, parts, part);
  const int64_t first = (blockIdx.x % column_blocks * kThreads + thread) * Count;
  const T* const column = gradients + (first < count ? layout.offset(first) : 0);
  A sum[Count] = {};
  for (int64_t begin = range.begin; begin < range.end; begin += kThreads) {
    const int64_t example = begin + thread;
    const A weight = example < range.end ? weights.load<T, A>(example) : A(0);
    const bool has_weight = weight != A(0);  // NaN is a weight
    const ActiveRank found = rank_active<kThreads>(has_weight);
    if (has_weight) {
      active[found.rank] = example * example_stride;
      active_weights[found.rank] = weight;
    }
    __syncthreads();
    if (first < count) {
#pragma unroll 4
      for (int a = 0; a < found.count; ++a) {
        const auto vector = *reinterpret_cast<const Vector<T, Count>*>(column + active[a]);
#pragma unroll
        for (int k = 0; k < Count; ++k) {
          sum[k] += active_weights[a] * static_cast<A>(vector.values[k]);
        }
      }
    }
    __syncthreads();  // before the next examples are listed
  }
  if (first < count) {
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      partial[part * count + first + k] = sum[k];
    }
  }
}

Tensor weighted_sum(const Tensor& gradients, const Tensor& weights) {
  check_weighted_sum(gradients, weights);
  const Launch launch(kOperation, gradients);
  const Sizes shape(gradients.sizes().begin() + 1, gradients.sizes().end());
  const Sizes strides(gradients.strides().begin() + 1, gradients.strides().end());
  const ScalarType dtype = gradients.scalar_type();
  const int64_t n = gradients.size(0);
  Tensor total = torch::stable::new_empty(gradients, shape, accumulation_dtype(dtype));
  const int64_t count = total.numel();
  if (count == 0 || n == 0) {
    return torch::stable::zero_(total);
  }
  const std::optional<StridedLayout> layout = StridedLayout::of(shape, strides);
  check(
      layout.has_value(),
      kOperation,
      "gradients have more than ",
      StridedLayout::kMaxDims,
      " dimensions that are not evenly apart in memory, got shape ",
      shape_of(gradients),
      "; call contiguous() on them");
  dispatch_device_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulation_t<T>;
    constexpr int kCount = kVectorElements<T>;
    const Strides whole{gradients.stride(0), 0, layout->strides[0]};
    const bool vectors =
        layout->dims == 1 && fits_vectors(data<T>(gradients), whole, count, kCount);
    const int64_t column_blocks = ceil_div(count / (vectors ? kCount : 1), kThreads);
    const int64_t parts = std::clamp<int64_t>(
        std::min(
            ceil_div(2 * launch.processors(), column_blocks),
            kWorkspaceBytes / (count * static_cast<int64_t>(sizeof(A)))),
        1,
        ceil_div(n, 32));
    const auto form = [&](const Tensor& partial) {
      launch.run(
          vectors ? &sum_examples<T, kCount> : &sum_examples<T, 1>,
          column_blocks * parts,
          kThreads,
          0,
          data<T>(gradients),
          gradients.stride(0),
          *layout,
          either_dtype(weights, dtype),
          n,
          count,
          column_blocks,
          parts,
          data<A>(partial));
    };
    form_in_parts(launch, parts, form, total);
  });
  return total;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) { m.impl("weighted_sum", TORCH_BOX(&weighted_sum)); }

}  // namespace l2rw::cuda
