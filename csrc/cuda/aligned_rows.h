#pragma once

// Tensors as the rows that the product kernels read.

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/tile_index.h"

namespace l2rw::cuda {

// The rows of a tensor, and what keeps their memory.
struct AlignedRows {
  Tensor tensor;
  Operand operand;
};

// [n, T, d] as n * T rows of `dtype`, evenly apart, with the numbers of a row side by side and
// every row at a multiple of 16 bytes. A tensor that lies so is taken as it is; any other is copied
// once, to a buffer of n T (d rounded up to 16 bytes).
AlignedRows aligned_rows(const Launch& launch, const Tensor& tensor, ScalarType dtype);

}  // namespace l2rw::cuda
