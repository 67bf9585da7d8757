#pragma once

// Which kernels multiply which dtype.

#include "checks.h"
#include "cuda/matmul_precision.h"
#include "cuda/product.cuh"

namespace l2rw::cuda {

// Two tiles for tensor cores: one that multiplies fastest, one for products of few rows or columns.
template <class T>
struct MatrixEngines {
  using Large = MatrixEngine<T, MatrixTile<128, 128, 64, 32>, 1>;
  using Small = MatrixEngine<T, MatrixTile<64, 64, 32, 32>, 3>;
};

template <class T>
struct PlainEngines {
  using Large = PlainEngine<T>;
  using Small = PlainEngine<T>;
};

// Calls body(Engines{}) with the way to multiply numbers of a floating dtype.
template <class Body>
void with_engines(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(PlainEngines<double>{});
    case ScalarType::BFloat16:
      return body(MatrixEngines<__nv_bfloat16>{});
    case ScalarType::Half:
      return body(MatrixEngines<__half>{});
    default:
      if (tf32_allowed()) {
        return body(MatrixEngines<float>{});
      }
      return body(PlainEngines<float>{});
  }
}

}  // namespace l2rw::cuda
