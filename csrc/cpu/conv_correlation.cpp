#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "operator_checks.h"
#include "layout.h"
#include "cpu/example_products.h"
#include "cpu/grain.h"

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

// u_i = sum_p g_i[:, p] . (V * z_i + V_b)[:, p], for contiguous tensors. convolve(z) is V * z +
// V_b.
template <class T, class Convolve>
void correlate_outputs(const Tensor& z, const Tensor& g, const Convolve& convolve, T* scores) {
  const int64_t size = g.numel() / z.size(0);
  const int64_t most = std::max<int64_t>(kChunkBytes / (size * sizeof(T)), 1);
  for (int64_t first = 0; first < z.size(0); first += most) {
    const int64_t count = std::min(most, z.size(0) - first);
    const Tensor product = convolve(examples_of(z, first, count));
    torch::stable::parallel_for(0, count, grain_of(size), [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) {
        scores[first + e] =
            kernels<T>().dot(data<T>(product) + e * size, data<T>(g) + (first + e) * size, size);
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
  const Convolution conv = check_directed_convolution(
      "conv_correlation", z, g, direction, direction_bias, stride, padding, dilation, groups);
  const ScalarType accumulation = accumulation_dtype(z.scalar_type());
  Tensor scores = torch::stable::new_empty(z, {conv.examples}, accumulation);
  if (g.numel() == 0) {
    return torch::stable::zero_(scores);
  }
  const bool own_dtype = z.scalar_type() == accumulation && direction.scalar_type() == accumulation;
  const bool contiguous = z.is_contiguous() && g.is_contiguous() && direction.is_contiguous() &&
                          (!direction_bias || direction_bias->is_contiguous());
  const bool few_pixels =
      conv.pixels() <= kFewPixels && conv.inputs >= kWideChannels && conv.outputs >= kWideChannels;
  dispatch_accumulation(accumulation, [&](auto zero) {
    using T = decltype(zero);
    if (few_pixels && own_dtype && contiguous) {
      const auto convolve = [&](const Tensor& part) {
        using torch::stable::detail::from;
        OptionalTensor bias;
        if (direction_bias) {
          bias = examples_of(*direction_bias, 0, direction_bias->size(0));
        }
        std::array<StableIValue, 9> stack{
            from(part),
            from(examples_of(direction, 0, direction.size(0))),
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
      };
      correlate_outputs<T>(z, g, convolve, data<T>(scores));
      return;
    }
    const OptionalTensor V = contiguous_in_accumulation_dtype(direction);
    const OptionalTensor V_b = contiguous_in_accumulation_dtype(direction_bias);
    form_example_products<T>(
        conv,
        image_of(z),
        image_of(g),
        {data<T>(V), data<T>(V_b), data<T>(scores), nullptr, nullptr});
  });
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) {
  m.impl("conv_correlation", TORCH_BOX(&conv_correlation));
}

}  // namespace l2rw
