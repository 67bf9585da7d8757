#pragma once

// torch's own matrix product and convolution, on plain memory. The tensors made here carry no
// autograd state, so a product may be formed of the memory of tensors that require gradients.
// Everything is checked before: an error raised inside a dispatcher call loses its text.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <vector>

namespace l2rw {

template <class T>
constexpr torch::headeronly::ScalarType kDtype =
    sizeof(T) == 8 ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;

// A tensor over memory that outlives it.
inline torch::stable::Tensor borrow(
    const void* memory,
    torch::headeronly::ScalarType dtype,
    const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& strides) {
  return torch::stable::from_blob(
      const_cast<void*>(memory),
      sizes,
      strides,
      torch::stable::Device(torch::headeronly::DeviceType::CPU),
      dtype);
}

template <class T>
struct Matrix {
  T* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;

  torch::stable::Tensor tensor() const {
    return borrow(data, kDtype<T>, {rows, columns}, {row_stride, column_stride});
  }
};

// product = a b.
template <class T>
void multiply(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& product) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(a.tensor()),
      torch::stable::detail::from(b.tensor()),
      torch::stable::detail::from(product.tensor())};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

inline torch::stable::Tensor convolve(
    const torch::stable::Tensor& input,
    const torch::stable::Tensor& weight,
    const std::optional<torch::stable::Tensor>& bias,
    const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation,
    int64_t groups) {
  std::array<StableIValue, 9> stack{
      torch::stable::detail::from(input),
      torch::stable::detail::from(weight),
      torch::stable::detail::from(bias),
      torch::stable::detail::from(stride),
      torch::stable::detail::from(padding),
      torch::stable::detail::from(dilation),
      torch::stable::detail::from(false),
      torch::stable::detail::from(std::vector<int64_t>(stride.size(), 0)),
      torch::stable::detail::from(groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

}  // namespace l2rw
