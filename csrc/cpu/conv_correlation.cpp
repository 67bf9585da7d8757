#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "operator_checks.h"
#include "cpu/convolution_arguments.h"
#include "cpu/example_products.h"

namespace l2rw {
namespace {

// For wide layers with few output pixels, G_i is larger than what it is made of, and V * z_i is
// cheaper; measured in docs/kernels.md.
constexpr int64_t kFewPixels = 49;
constexpr int64_t kWideChannels = 32;
// Bytes of V * z that exist at a time.
constexpr int64_t kChunkBytes = 1024 * 1024;

// Examples of a contiguous tensor, on their own: no autograd state is carried along.
Tensor examples_of(const Tensor& tensor, int64_t first, int64_t count) {
  Sizes sizes(tensor.sizes().begin(), tensor.sizes().end());
  const Sizes strides(tensor.strides().begin(), tensor.strides().end());
  sizes[0] = count;
  return torch::stable::from_blob(
      data<char>(tensor) + first * strides[0] * static_cast<int64_t>(tensor.element_size()),
      sizes,
      strides,
      tensor.device(),
      tensor.scalar_type());
}

Tensor convolve(
    const Tensor& input,
    const Tensor& weight,
    const OptionalTensor& bias,
    const Sizes& stride,
    const Sizes& padding,
    const Sizes& dilation,
    int64_t groups) {
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{
      from(input),
      from(weight),
      from(bias),
      from(stride),
      from(padding),
      from(dilation),
      from(false),
      from(Sizes(stride.size(), 0)),
      from(groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}

// u_i = sum_p g_i[:, p] . (V * z_i + V_b)[:, p], for contiguous tensors.
template <class T>
void correlate_outputs(
    const Tensor& z,
    const Tensor& g,
    const Tensor& direction,
    const OptionalTensor& direction_bias,
    const Sizes& stride,
    const Sizes& padding,
    const Sizes& dilation,
    int64_t groups,
    T* scores) {
  const int64_t size = g.numel() / std::max<int64_t>(g.size(0), 1);
  const int64_t most = std::max<int64_t>(kChunkBytes / (size * sizeof(T)), 1);
  const Tensor weight = examples_of(direction, 0, direction.size(0));
  OptionalTensor bias;
  if (direction_bias) {
    bias = examples_of(*direction_bias, 0, direction_bias->size(0));
  }
  for (int64_t first = 0; first < z.size(0); first += most) {
    const int64_t count = std::min(most, z.size(0) - first);
    const Tensor product =
        convolve(examples_of(z, first, count), weight, bias, stride, padding, dilation, groups);
    torch::stable::parallel_for(
        0, count, std::max<int64_t>(32768 / size, 1), [&](int64_t begin, int64_t end) {
          for (int64_t e = begin; e < end; ++e) {
            scores[first + e] = kernels<T>().dot(
                data<T>(product) + e * size, data<T>(g) + (first + e) * size, size);
          }
        });
  }
}

// u_i = <V, G_i> costs as many products as g_i . (V * z_i), and G_i is formed faster than torch
// forms V * z_i: it is formed tile by tile and never stored.
Tensor conv_correlation(
    const Tensor& z,
    const Tensor& g,
    const Tensor& direction,
    const OptionalTensor& direction_bias,
    const Sizes& stride,
    const Sizes& padding,
    const Sizes& dilation,
    int64_t groups) {
  const Convolution conv =
      check_conv_correlation(z, g, direction, direction_bias, stride, padding, dilation, groups);
  const ScalarType accumulation = accumulation_dtype(z.scalar_type());
  Tensor scores = torch::stable::new_empty(z, {conv.examples}, accumulation);
  if (conv.pixels() == 0 || conv.outputs == 0) {
    return torch::stable::zero_(scores);
  }
  const bool own_dtype = z.scalar_type() == accumulation && direction.scalar_type() == accumulation;
  const bool contiguous = z.is_contiguous() && g.is_contiguous() && direction.is_contiguous() &&
                          (!direction_bias || direction_bias->is_contiguous());
  const bool few_pixels =
      conv.pixels() <= kFewPixels && conv.inputs >= kWideChannels && conv.outputs >= kWideChannels;
  with_accumulation_type(accumulation, [&](auto zero) {
    using T = decltype(zero);
    if (few_pixels && own_dtype && contiguous) {
      correlate_outputs<T>(
          z, g, direction, direction_bias, stride, padding, dilation, groups, data<T>(scores));
      return;
    }
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) {
  m.impl("conv_correlation", TORCH_BOX(&conv_correlation));
}

}  // namespace l2rw
