#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "cuda/conv/aligned_image.cuh"
#include "cuda/conv_grad/kernels.cuh"
#include "cuda/gemm/heuristics.h"
#include "cuda/gemm/scheduler.h"
#include "cuda/reduce/block.cuh"
#include "cuda/reduce/partial_sums.cuh"
#include "cuda/util/integers.h"
#include "cuda/util/launch.cuh"
#include "cuda/util/types.cuh"
#include "operator_checks.h"

namespace l2rw::cuda {
namespace {

constexpr const char* kOperation = "conv_weighted_gradient";
constexpr int kListThreads = 256;
// From so many output channels of a group on, tiles are large if there are enough of them for all
// processors.
constexpr int64_t kManyOutputs = 65;

// The examples with w_i != 0, in order.
template <class A>
struct ActiveExamples {
  const int64_t* indices;  // [n + 1], the last element is their number; null: all examples
  const A* weights;        // [n]; null: all ones
  int64_t n;

  L2RW_HOST_DEVICE int64_t count() const { return indices == nullptr ? n : indices[n]; }
  L2RW_HOST_DEVICE int64_t example(int64_t k) const { return indices == nullptr ? k : indices[k]; }
  L2RW_HOST_DEVICE A weight(int64_t k) const { return weights == nullptr ? A(1) : weights[k]; }
};

template <class T>
__global__ void __launch_bounds__(kListThreads) list_active(
    const __grid_constant__ EitherDtype weights,  // [n]
    int64_t n,
    int64_t* __restrict__ indices,                    // [n + 1]
    accumulation_t<T>* __restrict__ their_weights) {  // [n]
  using A = accumulation_t<T>;
  const auto thread = static_cast<int>(threadIdx.x);
  int64_t count = 0;
  for (int64_t begin = 0; begin < n; begin += kListThreads) {
    const int64_t example = begin + thread;
    const A weight = example < n ? weights.load<T, A>(example) : A(0);
    const bool has_weight = weight != A(0);  // NaN is a weight
    const ActiveRank found = rank_active<kListThreads>(has_weight);
    if (has_weight) {
      indices[count + found.rank] = example;
      their_weights[count + found.rank] = weight;
    }
    count += found.count;
    __syncthreads();
  }
  if (thread == 0) {
    indices[n] = count;
  }
}

// The output that keeps the sum over each part of the examples in a workspace. There is a part for
// each block of a tile.
template <class A>
struct SummedGradients {
  ActiveExamples<A> examples;
  SplitExamples split;
  A* partial;       // [blocks, O, C / groups, taps]
  A* bias_partial;  // [blocks, O]
  int64_t size;
  int64_t bias_size;

  L2RW_HOST_DEVICE KTileIterator steps(int64_t part, int64_t k_tiles) const {
    return KTileIterator(
        split_range(examples.count() * split.splits, split.blocks, part), split.splits, k_tiles);
  }
  L2RW_HOST_DEVICE int64_t example(int64_t k) const { return examples.example(k); }
  L2RW_HOST_DEVICE A weight(int64_t k) const { return examples.weight(k); }
  __device__ __forceinline__ void write(int64_t part, int64_t k, A value, A&) const {
    partial[part * size + k] = value;
  }
  __device__ __forceinline__ void write_bias(int64_t part, int64_t o, A value, A&) const {
    bias_partial[part * bias_size + o] = value;
  }
  template <int Threads>
  __device__ __forceinline__ void finish(A) const {}
};

std::tuple<Tensor, Tensor> conv_weighted_gradient(
    const Tensor& z,
    const Tensor& g,
    const OptionalTensor& weights,
    const Sizes& kernel_size,
    const Sizes& stride,
    const Sizes& padding,
    const Sizes& dilation,
    int64_t groups) {
  const Convolution convolution =
      check_convolution(kOperation, z, g, kernel_size, stride, padding, dilation, groups);
  check_vector(kOperation, {"z", z}, "weights", weights, z.size(0), "examples of z");
  const ScalarType dtype = z.scalar_type();
  const Launch launch(kOperation, z);
  const Sizes shape = gradient_shape(convolution, kernel_size);
  Tensor gradient = torch::stable::new_empty(z, shape, accumulation_dtype(dtype));
  Tensor bias_gradient = torch::stable::new_empty(z, {g.size(1)}, accumulation_dtype(dtype));
  const int64_t n = convolution.examples;
  if (g.numel() == 0) {
    return {torch::stable::zero_(gradient), torch::stable::zero_(bias_gradient)};
  }
  check_countable(kOperation, convolution, z, g);
  with_gradient_kernels(launch, dtype, convolution, [&](auto kernels) {
    using Kernels = decltype(kernels);
    using T = typename Kernels::Small::Element;
    using A = typename Kernels::Small::Sum;
    const int64_t image_groups = Kernels::kByGroup ? groups : 1;
    const AlignedImage z_image = align_image(launch, z, image_groups, dtype);
    const AlignedImage g_image = align_image(launch, g, image_groups, dtype);
    ActiveExamples<A> examples{nullptr, nullptr, n};
    const Tensor indices = torch::stable::new_empty(z, {weights ? n + 1 : 0}, ScalarType::Long);
    const Tensor their_weights = torch::stable::new_empty(gradient, {weights ? n : 0});
    if (weights) {
      examples = {data<int64_t>(indices), data<A>(their_weights), n};
      launch.run(
          &list_active<T>,
          1,
          kListThreads,
          0,
          either_dtype(*weights, dtype),
          n,
          data<int64_t>(indices),
          data<A>(their_weights));
    }
    const int64_t sum_bytes =
        (gradient.numel() + bias_gradient.numel()) * static_cast<int64_t>(sizeof(A));
    // Forms the sums with this kernel, unless its tiles leave processors idle and `must` is false.
    const auto sum = [&](auto kernel, bool must) {
      using Kernel = decltype(kernel);
      const auto problem = Kernel::make_problem(convolution, z_image.view, g_image.view);
      const SplitExamples split =
          split_examples(problem.tile_count(), n, problem.k_tiles, sum_bytes, launch.processors());
      if (!must && problem.tile_count() * split.blocks < launch.processors()) {
        return false;
      }
      const auto form = [&](const Tensor& partial, const Tensor& bias_partial) {
        Kernel::run(
            launch,
            problem,
            split.blocks,
            SummedGradients<A>{
                examples,
                split,
                data<A>(partial),
                data<A>(bias_partial),
                gradient.numel(),
                bias_gradient.numel()});
      };
      form_in_parts(launch, split.blocks, form, gradient, bias_gradient);
      return true;
    };
    if (convolution.outputs <= kNarrowTileOutputs) {
      sum(typename Kernels::Narrow{}, true);
    } else if (convolution.outputs < kManyOutputs || !sum(typename Kernels::Large{}, false)) {
      sum(typename Kernels::Small{}, true);
    }
  });
  return {gradient, bias_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) {
  m.impl("conv_weighted_gradient", TORCH_BOX(&conv_weighted_gradient));
}

}  // namespace l2rw::cuda
