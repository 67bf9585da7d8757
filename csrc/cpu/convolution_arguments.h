#pragma once

// Arguments of the convolution operators: all checks, and the sizes in one form.

#include "correlation.h"
#include "cpu/convolution.h"

namespace l2rw {

// Calls body(T{}) with the accumulation type of a dtype.
template <class Body>
void with_accumulation_type(torch::headeronly::ScalarType dtype, const Body& body) {
  if (dtype == torch::headeronly::ScalarType::Double) {
    body(double{});
  } else {
    body(float{});
  }
}

// Checks z [n, C, *s], g [n, O, *p] and the geometry, and fills in one convolution of three spatial
// dimensions (missing ones have size 1). `kernel_size`: *k.
Convolution check_convolution(
    const char* operation,
    const torch::stable::Tensor& z,
    const torch::stable::Tensor& g,
    const Sizes& kernel_size,
    const Sizes& stride,
    const Sizes& padding,
    const Sizes& dilation,
    int64_t groups);

// Checks a direction [O, C / groups, *k] and its bias [O] against z.
void check_direction(
    const char* operation,
    const torch::stable::Tensor& z,
    const Convolution& convolution,
    const Sizes& kernel_size,
    const OptionalTensor& direction,
    const OptionalTensor& direction_bias);

Element element_of(torch::headeronly::ScalarType dtype);

// z or g as an image; missing spatial dimensions get stride 0.
Image image_of(const torch::stable::Tensor& tensor);

// All numbers of a tensor, contiguous and in the accumulation type; empty without a tensor.
template <class T>
std::vector<T> values_of(const OptionalTensor& tensor);

}  // namespace l2rw
