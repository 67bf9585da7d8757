#pragma once

// Which kernel forms the gradients of single examples of which layer.

#include "cuda/aligned_pixels.h"
#include "cuda/example_products.cuh"
#include "cuda/group_gradients.cuh"

namespace l2rw::cuda {

// Output channels of a group that the narrow tile holds.
constexpr int64_t kFewOutputs = 16;
// Pairs of channels in a group, of several, up to which tensor cores would find little to do.
constexpr int64_t kFewPairs = 16;

template <class Engines>
struct TileKernels {
  static constexpr bool kByGroup = true;  // rows of images are those of one group
  using Large = TileKernel<typename GradientEngines<Engines>::Large>;
  using Small = TileKernel<typename GradientEngines<Engines>::Small>;
  using Narrow = TileKernel<typename GradientEngines<Engines>::Narrow>;
};

template <class T>
struct GroupKernels {
  static constexpr bool kByGroup = false;
  using Large = GroupKernel<T>;
  using Small = GroupKernel<T>;
  using Narrow = GroupKernel<T>;
};

// Calls body(Kernels{}) for a layer with groups and pixels.
template <class Body>
void with_gradient_kernels(ScalarType dtype, const Convolution& convolution, const Body& body) {
  const int64_t pairs = convolution.inputs * convolution.outputs;
  if (convolution.groups > 1 && pairs > 0 && pairs <= kFewPairs) {
    dispatch_device_type(dtype, [&](auto zero) { body(GroupKernels<decltype(zero)>{}); });
  } else {
    with_engines(dtype, [&](auto engines) { body(TileKernels<decltype(engines)>{}); });
  }
}

// Pixels and the weights of an output are counted in 32 bits.
inline void check_countable(
    const char* operation, const Convolution& convolution, const Tensor& z, const Tensor& g) {
  check_pixels(operation, convolution, z);
  constexpr int64_t kMost = int64_t{1} << 29;
  check(
      g.size(1) <= kMost && z.size(1) * convolution.taps() <= kMost,
      operation,
      "g must have at most ",
      kMost,
      " channels on CUDA, and z as many times the taps, got shapes ",
      shape_of(g),
      " and ",
      shape_of(z));
}

}  // namespace l2rw::cuda
