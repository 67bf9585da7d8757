#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cpu/convolution_arguments.h"
#include "cpu/example_products.h"

namespace l2rw {
namespace {

std::tuple<Tensor, Tensor, Tensor> example_gradients(
    const Convolution& conv,
    const Tensor& z,
    const Image& z_image,
    const Image& g_image,
    const Sizes& gradient_shape,  // [O, C / groups, *k]
    const OptionalTensor& direction,
    const OptionalTensor& direction_bias) {
  const ScalarType dtype = z.scalar_type();
  const int64_t outputs = conv.groups * conv.outputs;
  Sizes shape = gradient_shape;
  shape.insert(shape.begin(), conv.examples);
  Tensor gradients = torch::stable::new_empty(z, shape);
  Tensor bias_gradients = torch::stable::new_empty(z, {conv.examples, outputs});
  Tensor scores = torch::stable::new_empty(z, {conv.examples}, accumulation_dtype(dtype));
  if (conv.pixels() == 0 || conv.inputs * conv.outputs == 0) {
    torch::stable::zero_(gradients);
    torch::stable::zero_(bias_gradients);
    torch::stable::zero_(scores);
  }
  with_accumulation_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<T> v = values_of<T>(direction);
    const std::vector<T> v_bias = values_of<T>(direction_bias);
    if (conv.pixels() == 0 || outputs == 0) {
      return;
    }
    form_example_products<T>(
        conv,
        z_image,
        g_image,
        {direction ? v.data() : nullptr,
         direction_bias ? v_bias.data() : nullptr,
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
  check_direction(kOperation, z, conv, kernel_size, direction, direction_bias);
  Sizes shape{g.size(1), conv.inputs};
  shape.insert(shape.end(), kernel_size.begin(), kernel_size.end());
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
  check_example_weights(kOperation, z, weights);
  const ScalarType accumulation = accumulation_dtype(z.scalar_type());
  Sizes shape{g.size(1), conv.inputs};
  shape.insert(shape.end(), kernel_size.begin(), kernel_size.end());
  Tensor gradient = torch::stable::new_empty(z, shape, accumulation);
  Tensor bias_gradient = torch::stable::new_empty(z, {g.size(1)}, accumulation);
  if (conv.pixels() == 0 || conv.outputs == 0) {
    return {torch::stable::zero_(gradient), torch::stable::zero_(bias_gradient)};
  }
  with_accumulation_type(accumulation, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<T> w = values_of<T>(weights);
    form_weighted_sum<T>(
        conv,
        image_of(z),
        image_of(g),
        weights ? w.data() : nullptr,
        data<T>(gradient),
        data<T>(bias_gradient));
  });
  return {gradient, bias_gradient};
}

std::tuple<Tensor, Tensor, Tensor> linear_example_gradients(
    const Tensor& z,
    const Tensor& g,
    const OptionalTensor& direction,
    const OptionalTensor& direction_bias) {
  const Convolution conv = check_linear_example_gradients(z, g, direction, direction_bias);
  const int64_t positions = z.size(1);
  const auto image = [&](const Tensor& tensor) {
    Image result = image_of(tensor);
    std::swap(result.channel, result.space[2]);
    result.space[0] = result.space[1] = positions * result.space[2];
    return result;
  };
  return example_gradients(
      conv, z, image(z), image(g), {g.size(2), z.size(2)}, direction, direction_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) {
  m.impl("linear_example_gradients", TORCH_BOX(&linear_example_gradients));
  m.impl("conv_example_gradients", TORCH_BOX(&conv_example_gradients));
  m.impl("conv_weighted_gradient", TORCH_BOX(&conv_weighted_gradient));
}

}  // namespace l2rw
