#pragma once

// The argument checks of the operators that have a kernel on both devices, and the sizes of a
// convolution in the form that its kernels read. No check looks at values, which may lie in device
// memory.

#include <algorithm>
#include <array>
#include <cstdint>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "convolution_sizes.h"

namespace l2rw {

// Two arguments of one layer, [n, T, *] each. `examples` and `positions` say whose n and T are.
inline void check_rows(
    const char* operation,
    Argument first,
    Argument second,
    const char* examples,
    const char* positions) {
  check_dim(operation, first, 3);
  check_dim(operation, second, 3);
  check_floating(operation, first);
  check_same(operation, first, second);
  check_size(operation, second, 0, first.tensor.size(0), examples);
  check_size(operation, second, 1, first.tensor.size(1), positions);
}

// A direction, if it is there, and its bias, whose size is the first of `shape`. `sizes` says what
// the numbers of `shape` are, the last of all that follow.
inline void check_direction(
    const char* operation,
    const Tensor& z,
    const OptionalTensor& direction,
    const OptionalTensor& direction_bias,
    const Sizes& shape,
    const std::array<const char*, 3>& sizes) {
  if (direction) {
    const Argument argument{"direction", *direction};
    check_same_or_accumulation(operation, {"z", z}, argument);
    check_dim(operation, argument, static_cast<int64_t>(shape.size()));
    for (size_t d = 0; d < shape.size(); ++d) {
      check_size(
          operation, argument, static_cast<int64_t>(d), shape[d], sizes[std::min<size_t>(d, 2)]);
    }
  }
  check_vector(operation, {"z", z}, "direction_bias", direction_bias, shape[0], sizes[0]);
}

// `which` follows the names of the arguments: which layer of several it is.
inline void check_factored_layer(
    const char* operation,
    const std::string& which,
    const Tensor& z,
    const Tensor& g,
    const Tensor& z_clean,
    const Tensor& g_clean) {
  const std::string names[] = {"z" + which, "g" + which, "z_clean" + which, "g_clean" + which};
  const Argument inputs{names[0].c_str(), z};
  const Argument clean_inputs{names[2].c_str(), z_clean};
  const Argument clean_gradients{names[3].c_str(), g_clean};
  check_rows(operation, inputs, {names[1].c_str(), g}, "examples of z", "positions of z");
  check_rows(
      operation, clean_inputs, clean_gradients, "examples of z_clean", "positions of z_clean");
  check_same(operation, inputs, clean_inputs);
  check_size(operation, clean_inputs, 2, z.size(2), "width of z");
  check_size(operation, clean_gradients, 2, g.size(2), "width of g");
}

inline void check_factored_correlations(
    const Tensors& z,
    const Tensors& g,
    const Tensors& z_clean,
    const Tensors& g_clean,
    const std::vector<bool>& bias) {
  constexpr const char* operation = "factored_correlations";
  check(!z.empty(), operation, "z must hold at least one layer, got none");
  for (const auto& [name, count] :
       {std::pair{"g", g.size()},
        std::pair{"z_clean", z_clean.size()},
        std::pair{"g_clean", g_clean.size()},
        std::pair{"bias", bias.size()}}) {
    check(
        count == z.size(), operation, name, " must hold ", z.size(), " (layers of z), got ", count);
  }
  for (size_t l = 0; l < z.size(); ++l) {
    std::string which(1, '[');
    which.append(std::to_string(l)).append(1, ']');
    check_factored_layer(operation, which, z[l], g[l], z_clean[l], g_clean[l]);
    const std::string names[] = {"z" + which, "z_clean" + which};
    check_same(operation, {"z[0]", z[0]}, {names[0].c_str(), z[l]});
    check_size(operation, {names[0].c_str(), z[l]}, 0, z[0].size(0), "examples of z[0]");
    check_size(
        operation, {names[1].c_str(), z_clean[l]}, 0, z_clean[0].size(0), "examples of z_clean[0]");
  }
}

// A linear layer z [n, T, i], g [n, T, o] with a direction [o, i] and its bias [o].
inline void check_linear_layer(
    const char* operation,
    const Tensor& z,
    const Tensor& g,
    const OptionalTensor& direction,
    const OptionalTensor& direction_bias) {
  check_rows(operation, {"z", z}, {"g", g}, "examples of z", "positions of z");
  check_direction(
      operation,
      z,
      direction,
      direction_bias,
      {g.size(2), z.size(2)},
      {"width of g", "width of z"});
}

inline void check_affine_example_gradients(
    const Tensor& x, const Tensor& g, const OptionalTensor& mean, const OptionalTensor& rstd) {
  constexpr const char* operation = "affine_example_gradients";
  check_rows(operation, {"x", x}, {"g", g}, "examples of x", "positions of x");
  check_size(operation, {"g", g}, 2, x.size(2), "channels of x");
  for (const auto& [name, statistic] : {std::pair{"mean", &mean}, std::pair{"rstd", &rstd}}) {
    if (!statistic->has_value()) {
      continue;
    }
    const Argument argument{name, **statistic};
    check_dim(operation, argument, 3);
    check_same_or_accumulation(operation, {"x", x}, argument);
    for (int64_t d = 0; d < 3; ++d) {
      check(
          argument.tensor.size(d) == 1 || argument.tensor.size(d) == x.size(d),
          operation,
          name,
          " must broadcast to the shape of x ",
          shape_of(x),
          ", got shape ",
          shape_of(argument.tensor));
    }
  }
}

// The index [n, T] and the gradient [n, T, d] of an embedding.
inline void check_embedding(const char* operation, const Tensor& index, const Tensor& g) {
  check_dim(operation, {"index", index}, 2);
  check_dim(operation, {"g", g}, 3);
  check_floating(operation, {"g", g});
  check_device(operation, {"g", g}, {"index", index});
  check_size(operation, {"index", index}, 0, g.size(0), "examples of g");
  check_size(operation, {"index", index}, 1, g.size(1), "positions of g");
  const ScalarType index_dtype = index.scalar_type();
  check(
      index_dtype == ScalarType::Long || index_dtype == ScalarType::Int,
      operation,
      "index must be int64 or int32, got ",
      dtype_name(index_dtype));
}

inline void check_embedding_correlation(
    const Tensor& index, const Tensor& g, const Tensor& direction) {
  constexpr const char* operation = "embedding_correlation";
  check_embedding(operation, index, g);
  check_dim(operation, {"direction", direction}, 2);
  check_same_or_accumulation(operation, {"g", g}, {"direction", direction});
  check_size(operation, {"direction", direction}, 1, g.size(2), "width of g");
}

inline void check_weighted_sum(const Tensor& gradients, const Tensor& weights) {
  constexpr const char* operation = "weighted_sum";
  check(
      gradients.dim() >= 1,
      operation,
      "gradients must have at least 1 dimension, got shape ",
      shape_of(gradients));
  const Argument argument{"gradients", gradients};
  check_floating(operation, argument);
  check_vector(operation, argument, "weights", weights, gradients.size(0), "examples of gradients");
}

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
  Convolution conv{z.size(0), groups, z.size(1) / groups, g.size(1) / groups};
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

// The shape of an example's gradient and of a direction, [O, C / groups, *k].
inline Sizes gradient_shape(const Convolution& conv, const Sizes& kernel_size) {
  Sizes shape{conv.groups * conv.outputs, conv.inputs};
  shape.insert(shape.end(), kernel_size.begin(), kernel_size.end());
  return shape;
}

constexpr std::array<const char*, 3> kGradientSizes{
    "channels of g", "channels of z in a group", "kernel_size"};

inline Convolution check_directed_convolution(
    const char* operation,
    const Tensor& z,
    const Tensor& g,
    const Tensor& direction,
    const OptionalTensor& direction_bias,
    const Sizes& stride,
    const Sizes& padding,
    const Sizes& dilation,
    int64_t groups) {
  check_dim(operation, {"direction", direction}, z.dim());
  Sizes kernel_size;
  for (int64_t d = 2; d < direction.dim(); ++d) {
    kernel_size.push_back(direction.size(d));
  }
  const Convolution conv =
      check_convolution(operation, z, g, kernel_size, stride, padding, dilation, groups);
  const Sizes shape = gradient_shape(conv, kernel_size);
  check_direction(operation, z, direction, direction_bias, shape, kGradientSizes);
  return conv;
}

// A linear layer z [n, T, i], g [n, T, o] as a convolution of width T with a kernel of one.
inline Convolution as_convolution(const Tensor& z, const Tensor& g) {
  Convolution conv{z.size(0), 1, z.size(2), g.size(2)};
  conv.in[2] = conv.out[2] = z.size(1);
  return conv;
}

}  // namespace l2rw
