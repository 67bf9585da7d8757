#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "correlation.h"
#include "cpu/convolution_arguments.h"
#include "cpu/example_products.h"

namespace l2rw {

// u_i = <V, G_i> costs what g_i . (V * z_i) does, and G_i is formed faster than torch's forward
// convolution is, so it is formed and dropped.
Tensor conv_correlation(
    const Tensor& z,
    const Tensor& g,
    const Tensor& direction,
    const OptionalTensor& direction_bias,
    const Sizes& stride,
    const Sizes& padding,
    const Sizes& dilation,
    int64_t groups) {
  constexpr const char* kOperation = "conv_correlation";
  check_dim(kOperation, {"direction", direction}, z.dim());
  Sizes kernel_size;
  for (int64_t d = 2; d < direction.dim(); ++d) {
    kernel_size.push_back(direction.size(d));
  }
  const Convolution conv =
      check_convolution(kOperation, z, g, kernel_size, stride, padding, dilation, groups);
  check_direction(kOperation, z, conv, kernel_size, direction, direction_bias);
  const ScalarType accumulation = accumulation_dtype(z.scalar_type());
  Tensor scores = torch::stable::new_empty(z, {conv.examples}, accumulation);
  if (conv.pixels() == 0 || conv.outputs == 0) {
    return torch::stable::zero_(scores);
  }
  with_accumulation_type(z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const std::vector<T> v = values_of<T>(direction);
    const std::vector<T> v_bias = values_of<T>(direction_bias);
    form_example_products<T>(
        conv,
        image_of(z),
        image_of(g),
        {v.data(), direction_bias ? v_bias.data() : nullptr, data<T>(scores), nullptr, nullptr});
  });
  return scores;
}

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) {
  m.impl("conv_correlation", TORCH_BOX(&conv_correlation));
}

}  // namespace l2rw
