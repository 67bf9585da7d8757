#pragma once

// The argument checks of the operators of convolutions, and the sizes in one form, on both devices.

#include <cstdint>
#include <string>

#include "checks.h"
#include "convolution_sizes.h"
#include "correlation.h"

namespace l2rw {

inline std::string text_of(const Sizes& sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t d = 0; d < sizes.size(); ++d) {
    text << (d == 0 ? "" : ", ") << sizes[d];
  }
  text << "]";
  return text.str();
}

inline void check_sizes(
    const char* operation, const char* name, const Sizes& sizes, int64_t dims, int64_t least) {
  check(
      static_cast<int64_t>(sizes.size()) == dims,
      operation,
      name,
      " must have ",
      dims,
      dims == 1 ? " number" : " numbers",
      ", one for each spatial dimension of z, got ",
      text_of(sizes));
  for (const int64_t size : sizes) {
    check(size >= least, operation, name, " must be at least ", least, ", got ", text_of(sizes));
  }
}

// Checks z [n, C, *s], g [n, O, *p] and the geometry, and fills in one convolution of three spatial
// dimensions (missing ones have size 1). `kernel_size`: *k.
inline Convolution check_convolution(
    const char* operation,
    const Tensor& z,
    const Tensor& g,
    const Sizes& kernel_size,
    const Sizes& stride,
    const Sizes& padding,
    const Sizes& dilation,
    int64_t groups) {
  check(
      z.dim() >= 3 && z.dim() <= 5,
      operation,
      "z must have 3 to 5 dimensions (examples, channels, 1 to 3 of space), got shape ",
      shape_of(z));
  check_dim(operation, {"g", g}, z.dim());
  check_floating(operation, {"z", z});
  check_same(operation, {"z", z}, {"g", g});
  check_size(operation, {"g", g}, 0, z.size(0), "examples of z");
  const int64_t dims = z.dim() - 2;
  check_sizes(operation, "kernel_size", kernel_size, dims, 1);
  check_sizes(operation, "stride", stride, dims, 1);
  check_sizes(operation, "padding", padding, dims, 0);
  check_sizes(operation, "dilation", dilation, dims, 1);
  check(
      groups >= 1 && z.size(1) % groups == 0 && g.size(1) % groups == 0,
      operation,
      "groups must divide the channels of z (",
      z.size(1),
      ") and of g (",
      g.size(1),
      "), got ",
      groups);
  Convolution conv{
      z.size(0),
      groups,
      z.size(1) / groups,
      g.size(1) / groups,
      {1, 1, 1},
      {1, 1, 1},
      {1, 1, 1},
      {1, 1, 1},
      {0, 0, 0},
      {1, 1, 1}};
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t to = 3 - dims + d;
    conv.in[to] = z.size(2 + d);
    conv.kernel[to] = kernel_size[d];
    conv.stride[to] = stride[d];
    conv.padding[to] = padding[d];
    conv.dilation[to] = dilation[d];
    const int64_t free = z.size(2 + d) + 2 * padding[d] - dilation[d] * (kernel_size[d] - 1) - 1;
    conv.out[to] = free < 0 ? 0 : free / stride[d] + 1;
    check_size(operation, {"g", g}, 2 + d, conv.out[to], "what the convolution of z gives");
  }
  return conv;
}

// Checks a direction [O, C / groups, *k] and its bias [O] against z.
inline void check_direction(
    const char* operation,
    const Tensor& z,
    const Convolution& conv,
    const Sizes& kernel_size,
    const OptionalTensor& direction,
    const OptionalTensor& direction_bias) {
  const int64_t outputs = conv.groups * conv.outputs;
  if (direction) {
    const Argument argument{"direction", *direction};
    check_same_or_accumulation(operation, {"z", z}, argument);
    check_dim(operation, argument, z.dim());
    check_size(operation, argument, 0, outputs, "channels of g");
    check_size(operation, argument, 1, conv.inputs, "channels of z in a group");
    for (size_t d = 0; d < kernel_size.size(); ++d) {
      check_size(operation, argument, 2 + d, kernel_size[d], "kernel_size");
    }
  }
  if (direction_bias) {
    const Argument argument{"direction_bias", *direction_bias};
    check_same_or_accumulation(operation, {"z", z}, argument);
    check_dim(operation, argument, 1);
    check_size(operation, argument, 0, outputs, "channels of g");
  }
}

inline Convolution check_conv_correlation(
    const Tensor& z,
    const Tensor& g,
    const Tensor& direction,
    const OptionalTensor& direction_bias,
    const Sizes& stride,
    const Sizes& padding,
    const Sizes& dilation,
    int64_t groups) {
  constexpr const char* operation = "conv_correlation";
  check_dim(operation, {"direction", direction}, z.dim());
  Sizes kernel_size;
  for (int64_t d = 2; d < direction.dim(); ++d) {
    kernel_size.push_back(direction.size(d));
  }
  const Convolution conv =
      check_convolution(operation, z, g, kernel_size, stride, padding, dilation, groups);
  check_direction(operation, z, conv, kernel_size, direction, direction_bias);
  return conv;
}

// Checks the weights [n] of a weighted sum over examples of z.
inline void check_example_weights(
    const char* operation, const Tensor& z, const OptionalTensor& weights) {
  if (weights) {
    check_same_or_accumulation(operation, {"z", z}, {"weights", *weights});
    check_dim(operation, {"weights", *weights}, 1);
    check_size(operation, {"weights", *weights}, 0, z.size(0), "examples of z");
  }
}

// Checks a linear layer z [n, T, i], g [n, T, o] and its direction, and gives it as a convolution
// of width T with a kernel of one.
inline Convolution check_linear_example_gradients(
    const Tensor& z,
    const Tensor& g,
    const OptionalTensor& direction,
    const OptionalTensor& direction_bias) {
  constexpr const char* operation = "linear_example_gradients";
  check_dim(operation, {"z", z}, 3);
  check_dim(operation, {"g", g}, 3);
  check_floating(operation, {"z", z});
  check_same(operation, {"z", z}, {"g", g});
  check_size(operation, {"g", g}, 0, z.size(0), "examples of z");
  check_size(operation, {"g", g}, 1, z.size(1), "positions of z");
  if (direction) {
    check_same_or_accumulation(operation, {"z", z}, {"direction", *direction});
    check_dim(operation, {"direction", *direction}, 2);
    check_size(operation, {"direction", *direction}, 0, g.size(2), "width of g");
    check_size(operation, {"direction", *direction}, 1, z.size(2), "width of z");
  }
  if (direction_bias) {
    check_same_or_accumulation(operation, {"z", z}, {"direction_bias", *direction_bias});
    check_dim(operation, {"direction_bias", *direction_bias}, 1);
    check_size(operation, {"direction_bias", *direction_bias}, 0, g.size(2), "width of g");
  }
  const int64_t positions = z.size(1);
  return {
      z.size(0),
      1,
      z.size(2),
      g.size(2),
      {1, 1, positions},
      {1, 1, positions},
      {1, 1, 1},
      {1, 1, 1},
      {0, 0, 0},
      {1, 1, 1}};
}

}  // namespace l2rw
