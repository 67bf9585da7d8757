#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "operator_checks.h"
#include "cuda/active_examples.cuh"
#include "cuda/gradient_kernels.cuh"
#include "cuda/partial_sums.h"

namespace l2rw {
namespace cuda {
namespace {

constexpr const char* kOperation = "conv_weighted_gradient";
constexpr int kListThreads = 256;
// Output channels of a group from which on tiles are large, if there are enough of them for all
// processors.
constexpr int64_t kManyOutputs = 65;

// The examples with w_i != 0, in order.
template <class A>
struct ActiveExamples {
  const int64_t* places;  // [n + 1], the last one their number; null: all of them
  const A* weights;       // [n]; null: all ones
  int64_t n;

  L2RW_HOST_DEVICE int64_t count() const { return places == nullptr ? n : places[n]; }
  L2RW_HOST_DEVICE int64_t example(int64_t k) const { return places == nullptr ? k : places[k]; }
  L2RW_HOST_DEVICE A weight(int64_t k) const { return weights == nullptr ? A(1) : weights[k]; }
};

template <class T>
__global__ void __launch_bounds__(kListThreads) list_active(
    const __grid_constant__ Either weights,  // [n]
    int64_t n,
    int64_t* __restrict__ places,                     // [n + 1]
    accumulation_t<T>* __restrict__ their_weights) {  // [n]
  using A = accumulation_t<T>;
  const auto thread = static_cast<int>(threadIdx.x);
  int64_t count = 0;
  for (int64_t begin = 0; begin < n; begin += kListThreads) {
    const int64_t example = begin + thread;
    const A weight = example < n ? weights.load<T, A>(example) : A(0);
    const bool has_weight = weight != A(0);  // NaN has
    const ActivePlace found = place_active<kListThreads>(has_weight);
    if (has_weight) {
      places[count + found.place] = example;
      their_weights[count + found.place] = weight;
    }
    count += found.count;
    __syncthreads();
  }
  if (thread == 0) {
    places[n] = count;
  }
}

// Sums over shares of the examples. A part is a share.
template <class A>
struct SummedGradients {
  ActiveExamples<A> examples;
  SharePlan plan;
  A* partial;       // [shares, O, C / groups, taps]
  A* bias_partial;  // [shares, O]
  int64_t size;
  int64_t bias_size;

  L2RW_HOST_DEVICE Walk walk(int64_t part, int64_t chunks) const {
    return Walk(
        split_range(examples.count() * plan.splits, plan.shares, part), plan.splits, chunks);
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

// `gradient` and `bias_gradient` get the sums of the shares, in order.
template <class Kernel>
void sum_gradients(
    const Launch& launch,
    const typename Kernel::Layer& layer,
    const SharePlan& plan,
    const ActiveExamples<typename Kernel::Sum>& examples,
    const Tensor& gradient,
    const Tensor& bias_gradient) {
  using A = typename Kernel::Sum;
  const auto partial_of = [&](const Tensor& total) {
    return plan.shares == 1 ? total : torch::stable::new_empty(total, {plan.shares, total.numel()});
  };
  const Tensor partial = partial_of(gradient);
  const Tensor bias_partial = partial_of(bias_gradient);
  Kernel::run(
      launch,
      layer,
      plan.shares,
      SummedGradients<A>{
          examples,
          plan,
          data<A>(partial),
          data<A>(bias_partial),
          gradient.numel(),
          bias_gradient.numel()});
  if (plan.shares > 1) {
    sum_parts(launch, bias_partial, bias_gradient);
    if (gradient.numel() > 0) {
      sum_parts(launch, partial, gradient);
    }
  }
}

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
  check_example_weights(kOperation, z, weights);
  const ScalarType dtype = z.scalar_type();
  const Launch launch(kOperation, z);
  Sizes shape{g.size(1), convolution.inputs};
  shape.insert(shape.end(), kernel_size.begin(), kernel_size.end());
  Tensor gradient = torch::stable::new_empty(z, shape, accumulation_dtype(dtype));
  Tensor bias_gradient = torch::stable::new_empty(z, {g.size(1)}, accumulation_dtype(dtype));
  const int64_t n = convolution.examples;
  if (n * convolution.pixels() * convolution.outputs == 0) {
    return {torch::stable::zero_(gradient), torch::stable::zero_(bias_gradient)};
  }
  check_countable(kOperation, convolution, z, g);
  with_gradient_kernels(dtype, convolution, [&](auto kernels) {
    using Kernels = decltype(kernels);
    using T = typename Kernels::Small::Element;
    using A = typename Kernels::Small::Sum;
    const int64_t rows_of = Kernels::kByGroup ? groups : 1;
    const AlignedPixels z_pixels = aligned_pixels(launch, z, rows_of, dtype);
    const AlignedPixels g_pixels = aligned_pixels(launch, g, rows_of, dtype);
    ActiveExamples<A> examples{nullptr, nullptr, n};
    const Tensor places = torch::stable::new_empty(z, {weights ? n + 1 : 0}, ScalarType::Long);
    const Tensor their_weights = torch::stable::new_empty(gradient, {weights ? n : 0});
    if (weights) {
      examples = {data<int64_t>(places), data<A>(their_weights), n};
      launch.run(
          &list_active<T>,
          1,
          kListThreads,
          0,
          either(*weights, dtype),
          n,
          data<int64_t>(places),
          data<A>(their_weights));
    }
    const int64_t sum_bytes =
        (gradient.numel() + bias_gradient.numel()) * static_cast<int64_t>(sizeof(A));
    // Forms the sums with this kernel, unless its tiles leave processors idle and `must` is false.
    const auto sum = [&](auto kernel, bool must) {
      using Kernel = decltype(kernel);
      const auto layer = Kernel::lay_out(convolution, z_pixels.pixels, g_pixels.pixels);
      const SharePlan plan =
          plan_shares(layer.tile_count(), n, layer.chunks, sum_bytes, launch.processors());
      if (!must && layer.tile_count() * plan.shares < launch.processors()) {
        return false;
      }
      sum_gradients<Kernel>(launch, layer, plan, examples, gradient, bias_gradient);
      return true;
    };
    if (convolution.outputs <= kFewOutputs) {
      sum(typename Kernels::Narrow{}, true);
    } else if (convolution.outputs < kManyOutputs || !sum(typename Kernels::Large{}, false)) {
      sum(typename Kernels::Small{}, true);
    }
  });
  return {gradient, bias_gradient};
}

}  // namespace
}  // namespace cuda

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) {
  m.impl("conv_weighted_gradient", TORCH_BOX(&cuda::conv_weighted_gradient));
}

}  // namespace l2rw
