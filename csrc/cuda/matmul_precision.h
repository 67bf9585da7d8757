#pragma once

// torch's setting for products of float32 matrices.

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>

// cuBLAS comes with libtorch_cuda.so. A torch without a shared cuBLAS leaves the function missing,
// and float32 exact.
extern "C" __attribute__((weak)) int cublasGetMathMode(void* handle, int* mode);

namespace l2rw::cuda {

// Whether a product of float32 matrices may be rounded to TF32: torch.set_float32_matmul_precision
// and torch.backends.cuda.matmul.allow_tf32. The stable ABI has no question for it, but torch
// writes the setting to the cuBLAS handle whenever it hands it out.
inline bool tf32_allowed() {
  constexpr int kTensorFloat32 = 3;  // CUBLAS_TF32_TENSOR_OP_MATH
  constexpr int kModes = 15;         // the rest are flags
  if (cublasGetMathMode == nullptr) {
    return false;
  }
  void* handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  int mode = 0;
  return cublasGetMathMode(handle, &mode) == 0 && (mode & kModes) == kTensorFloat32;
}

}  // namespace l2rw::cuda
