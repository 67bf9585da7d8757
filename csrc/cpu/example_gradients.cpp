#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "layout.h"
#include "operator_checks.h"
#include "cpu/example_products.h"

namespace l2rw {
namespace {

std::tuple<Tensor, Tensor, Tensor> example_gradients(
    const Convolution& conv,
    const Tensor& z,
    const Image& z_image,
    const Image& g_image,
    Sizes shape,  // [O, C / groups, *k]
    const OptionalTensor& direction,
    const OptionalTensor& direction_bias) {
  const ScalarType accumulation = accumulation_dtype(z.scalar_type());
  const int64_t outputs = conv.groups * conv.outputs;
  shape.insert(shape.begin(), conv.examples);
  Tensor gradients = torch::stable::new_empty(z, shape);
  Tensor bias_gradients = torch::stable::new_empty(z, {conv.examples, outputs});
  Tensor scores = torch::stable::new_empty(z, {conv.examples}, accumulation);
  if (conv.pixels() == 0 || outputs == 0) {
    return {
        torch::stable::zero_(gradients),
        torch::stable::zero_(bias_gradients),
        torch::stable::zero_(scores)};
  }
  const OptionalTensor V = contiguous_in_accumulation_dtype(direction);
  const OptionalTensor V_b = contiguous_in_accumulation_dtype(direction_bias);
  dispatch_accumulation(accumulation, [&](auto zero) {
    using T = decltype(zero);
    form_example_products<T>(
        conv,
        z_image,
        g_image,
        {data<T>(V),
         data<T>(V_b),
         data<T>(scores),
         conv.inputs == 0 ? nullptr : gradients.data_ptr(),
         bias_gradients.data_ptr()});
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
  const Convolution conv =
      check_convolution(kOperation, z, g, kernel_size, stride, padding, dilation, groups);
  const Sizes shape = gradient_shape(conv, kernel_size);
  check_direction(kOperation, z, direction, direction_bias, shape, kGradientSizes);
  return example_gradients(conv, z, image_of(z), image_of(g), shape, direction, direction_bias);
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
  constexpr const char* kOperation = "conv_weighted_gradient";
  const Convolution conv =
      check_convolution(kOperation, z, g, kernel_size, stride, padding, dilation, groups);
  check_vector(kOperation, {"z", z}, "weights", weights, z.size(0), "examples of z");
  const ScalarType accumulation = accumulation_dtype(z.scalar_type());
  Tensor gradient = torch::stable::new_empty(z, gradient_shape(conv, kernel_size), accumulation);
  Tensor bias_gradient = torch::stable::new_empty(z, {g.size(1)}, accumulation);
  if (conv.pixels() == 0 || conv.outputs == 0) {
    return {torch::stable::zero_(gradient), torch::stable::zero_(bias_gradient)};
  }
  const OptionalTensor w = contiguous_in_accumulation_dtype(weights);
  dispatch_accumulation(accumulation, [&](auto zero) {
    using T = decltype(zero);
    form_weighted_sum<T>(
        conv, image_of(z), image_of(g), data<T>(w), data<T>(gradient), data<T>(bias_gradient));
  });
  return {gradient, bias_gradient};
}

std::tuple<Tensor, Tensor, Tensor> linear_example_gradients(
    const Tensor& z,
    const Tensor& g,
    const OptionalTensor& direction,
    const OptionalTensor& direction_bias) {
  check_linear_layer("linear_example_gradients", z, g, direction, direction_bias);
  return example_gradients(
      as_convolution(z, g),
      z,
      image_of_rows(z),
      image_of_rows(g),
      {g.size(2), z.size(2)},
      direction,
      direction_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) {
  m.impl("linear_example_gradients", TORCH_BOX(&linear_example_gradients));
  m.impl("conv_example_gradients", TORCH_BOX(&conv_example_gradients));
  m.impl("conv_weighted_gradient", TORCH_BOX(&conv_weighted_gradient));
}

}  // namespace l2rw
