#include "cpu/convolution_arguments.h"

#include <algorithm>

namespace l2rw {

Element element_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return Element::f64;
    case ScalarType::Float:
      return Element::f32;
    case ScalarType::BFloat16:
      return Element::bf16;
    default:
      return Element::f16;
  }
}

Image image_of(const Tensor& tensor) {
  const int64_t dims = tensor.dim() - 2;
  Image image{
      tensor.data_ptr(),
      element_of(tensor.scalar_type()),
      tensor.stride(0),
      tensor.stride(1),
      {0, 0, 0}};
  for (int64_t d = 0; d < dims; ++d) {
    image.space[3 - dims + d] = tensor.stride(2 + d);
  }
  // A dimension of size one may have any stride: give it the one that lets rows follow each other.
  for (int64_t d = 1; d >= 0; --d) {
    const int64_t at = d - (3 - dims);
    if (at < 0 || tensor.size(2 + at) == 1) {
      const int64_t inner = d + 1 - (3 - dims);
      image.space[d] = image.space[d + 1] * tensor.size(2 + inner);
    }
  }
  return image;
}

template <class T>
std::vector<T> values_of(const OptionalTensor& tensor) {
  if (!tensor) {
    return {};
  }
  const Tensor& source = *tensor;
  const int64_t dims = source.dim();
  std::vector<T> values(source.numel());
  dispatch_floating(source.scalar_type(), [&](auto element) {
    using S = decltype(element);
    const S* from = data<S>(source);
    if (source.is_contiguous()) {
      std::copy(from, from + source.numel(), values.begin());
      return;
    }
    std::vector<int64_t> index(dims, 0);
    int64_t offset = 0;
    for (T& value : values) {
      value = static_cast<T>(from[offset]);
      for (int64_t d = dims - 1; d >= 0; --d) {
        offset += source.stride(d);
        if (++index[d] < source.size(d)) {
          break;
        }
        offset -= source.stride(d) * source.size(d);
        index[d] = 0;
      }
    }
  });
  return values;
}

template std::vector<float> values_of(const OptionalTensor&);
template std::vector<double> values_of(const OptionalTensor&);

}  // namespace l2rw
