#pragma once

// Arguments of the convolution operators as the kernels read them.

#include "operator_checks.h"
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

Element element_of(torch::headeronly::ScalarType dtype);

// z or g as an image; missing spatial dimensions get stride 0.
Image image_of(const torch::stable::Tensor& tensor);

// All numbers of a tensor, contiguous and in the accumulation type; empty without a tensor.
template <class T>
std::vector<T> values_of(const OptionalTensor& tensor);

}  // namespace l2rw
