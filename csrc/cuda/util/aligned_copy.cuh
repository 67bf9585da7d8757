#pragma once

// Tensors as matrices with aligned rows, copied if they do not lie so.

#include "checks.h"
#include "cuda/util/launch.cuh"
#include "cuda/util/vectors.h"

namespace l2rw::cuda {

// A matrix, and what keeps its memory.
struct AlignedMatrix {
  Tensor tensor;
  MatrixView view;
};

// [n, T, d] as n * T evenly spaced rows of `dtype`, each contiguous and at a multiple of 16 bytes.
// A tensor that lies so is read in place; any other is copied once, with d rounded up to 16 bytes.
AlignedMatrix align_matrix(const Launch& launch, const Tensor& tensor, ScalarType dtype);

}  // namespace l2rw::cuda
