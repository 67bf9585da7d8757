#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "cuda/conv/aligned_image.cuh"
#include "cuda/conv_grad/kernels.cuh"
#include "cuda/gemm/scheduler.h"
#include "cuda/reduce/block.cuh"
#include "cuda/reduce/partial_sums.cuh"
#include "cuda/util/launch.cuh"
#include "layout.h"
#include "operator_checks.h"

namespace l2rw::cuda {
namespace {

// The output that stores G_i and Gb_i in the dtype of z, and adds up their product with the
// direction before they are rounded. A part is one example.
template <class T, class A>
struct StoredGradients {
  const A* direction;       // [O, C / groups, taps] or null
  const A* direction_bias;  // [O] or null
  T* gradients;             // [n, O, C / groups, taps]
  T* bias_gradients;        // [n, O]
  A* scores;                // [n, tiles] or null
  int64_t size;             // elements of G_i
  int64_t bias_size;        // O

  L2RW_HOST_DEVICE KTileIterator steps(int64_t part, int64_t k_tiles) const {
    return KTileIterator({part, part + 1}, 1, k_tiles);
  }
  L2RW_HOST_DEVICE int64_t example(int64_t k) const { return k; }
  L2RW_HOST_DEVICE A weight(int64_t) const { return A(1); }
  __device__ __forceinline__ void write(int64_t part, int64_t k, A value, A& score) const {
    gradients[part * size + k] = static_cast<T>(value);
    if (direction != nullptr) {
      score += direction[k] * value;
    }
  }
  __device__ __forceinline__ void write_bias(int64_t part, int64_t o, A value, A& score) const {
    bias_gradients[part * bias_size + o] = static_cast<T>(value);
    if (direction_bias != nullptr) {
      score += direction_bias[o] * value;
    }
  }
  template <int Threads>
  __device__ __forceinline__ void finish(A score) const {
    if (scores != nullptr) {
      const A sum = block_sum<Threads>(score);
      if (threadIdx.x == 0) {
        scores[blockIdx.x] = sum;
      }
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> example_gradients(
    const char* operation,
    const Convolution& convolution,
    const Tensor& z,  // [n, C, *s]
    const Tensor& g,  // [n, O, *p]
    Sizes shape,      // [O, C / groups, *k]
    const OptionalTensor& direction,
    const OptionalTensor& direction_bias) {
  const ScalarType dtype = z.scalar_type();
  const int64_t examples = convolution.examples;
  const bool has_direction = direction || direction_bias;
  const Launch launch(operation, z);
  shape.insert(shape.begin(), examples);
  Tensor gradients = torch::stable::new_empty(z, shape);
  Tensor bias_gradients = torch::stable::new_empty(z, {examples, shape[1]});
  Tensor scores = torch::stable::new_empty(z, {examples}, accumulation_dtype(dtype));
  if (!has_direction || g.numel() == 0) {
    torch::stable::zero_(scores);
  }
  if (g.numel() == 0) {
    return {torch::stable::zero_(gradients), torch::stable::zero_(bias_gradients), scores};
  }
  check_countable(operation, convolution, z, g);
  const OptionalTensor V = contiguous_in_accumulation_dtype(direction);
  const OptionalTensor V_b = contiguous_in_accumulation_dtype(direction_bias);
  with_gradient_kernels(launch, dtype, convolution, [&](auto kernels) {
    using Kernels = decltype(kernels);
    const int64_t groups = Kernels::kByGroup ? convolution.groups : 1;
    const AlignedImage z_image = align_image(launch, z, groups, dtype);
    const AlignedImage g_image = align_image(launch, g, groups, dtype);
    const auto store = [&](auto kernel) {
      using Kernel = decltype(kernel);
      using T = typename Kernel::Element;
      using A = typename Kernel::Sum;
      const auto problem = Kernel::make_problem(convolution, z_image.view, g_image.view);
      const auto run = [&](A* tile_scores) {
        Kernel::run(
            launch,
            problem,
            examples,
            StoredGradients<T, A>{
                data<A>(V),
                data<A>(V_b),
                data<T>(gradients),
                data<T>(bias_gradients),
                tile_scores,
                gradients.numel() / examples,
                bias_gradients.size(1)});
      };
      if (has_direction) {
        const int64_t tiles = problem.tile_count();
        sum_parts_of_rows(launch, 1, examples * tiles, tiles, scores, [&](const Tensor& partial) {
          run(data<A>(partial));
        });
      } else {
        run(nullptr);
      }
    };
    if (convolution.outputs <= kNarrowTileOutputs) {
      store(typename Kernels::Narrow{});
    } else {
      store(typename Kernels::Small{});
    }
  });
  return {gradients, bias_gradients, scores};
}

std::tuple<Tensor, Tensor, Tensor> conv_example_gradients(
    const Tensor& z,
    const Tensor& g,
    const Sizes& kernel_size,
    const Sizes& stride,
    const Sizes& padding,
    const Sizes& dilation,
    int64_t groups,
    const OptionalTensor& direction,
    const OptionalTensor& direction_bias) {
  constexpr const char* kOperation = "conv_example_gradients";
  const Convolution convolution =
      check_convolution(kOperation, z, g, kernel_size, stride, padding, dilation, groups);
  const Sizes shape = gradient_shape(convolution, kernel_size);
  check_direction(kOperation, z, direction, direction_bias, shape, kGradientSizes);
  return example_gradients(kOperation, convolution, z, g, shape, direction, direction_bias);
}

std::tuple<Tensor, Tensor, Tensor> linear_example_gradients(
    const Tensor& z,
    const Tensor& g,
    const OptionalTensor& direction,
    const OptionalTensor& direction_bias) {
  constexpr const char* kOperation = "linear_example_gradients";
  check_linear_layer(kOperation, z, g, direction, direction_bias);
  return example_gradients(
      kOperation,
      as_convolution(z, g),
      torch::stable::transpose(z, 1, 2),
      torch::stable::transpose(g, 1, 2),
      {g.size(2), z.size(2)},
      direction,
      direction_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) {
  m.impl("linear_example_gradients", TORCH_BOX(&linear_example_gradients));
  m.impl("conv_example_gradients", TORCH_BOX(&conv_example_gradients));
}

}  // namespace l2rw::cuda
