#pragma once

// The device's types for torch's dtypes.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "checks.h"

namespace l2rw::cuda {

// Calls body(T{}) with the device's type of a floating dtype that has been checked.
template <class Body>
void dispatch_device_type(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    case ScalarType::Half:
      return body(__half{});
    default:
      return dispatch_accumulation(dtype, body);
  }
}

inline int64_t bytes_of(ScalarType dtype) {
  int64_t bytes = 0;
  dispatch_device_type(dtype, [&](auto zero) { bytes = sizeof(zero); });
  return bytes;
}

// A one-dimensional tensor in either of the two dtypes that a direction or a weight may have.
struct EitherDtype {
  const void* data;
  int64_t stride;
  bool wide;  // in the accumulation dtype, not in that of the inputs

  template <class T, class A>
  __device__ A load(int64_t i) const {
    return wide ? static_cast<const A*>(data)[i * stride]
                : static_cast<A>(static_cast<const T*>(data)[i * stride]);
  }
};

inline EitherDtype either_dtype(const Tensor& tensor, ScalarType narrow) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.scalar_type() != narrow};
}

}  // namespace l2rw::cuda
