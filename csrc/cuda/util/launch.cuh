#pragma once

// What every launch needs: the device with its properties, torch's stream and settings, and the
// checks before and after. The tests replace this file by one that launches on the host
// (python_tests/cuda/emulator).

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string_view>

#include "checks.h"
#include "cuda/util/limits.h"

// cuBLAS comes with libtorch_cuda.so. In a torch without a shared cuBLAS the function is missing,
// and products of float32 are exact.
extern "C" __attribute__((weak)) int cublasGetMathMode(void* handle, int* mode);

namespace l2rw::cuda {

// Throws if a call of the runtime has failed. The runtime of this library keeps the error, which
// torch, with a runtime of its own, does not clear: the next launch would report it a second time.
inline void check_runtime(cudaError_t error) {
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
  }
  STD_CUDA_CHECK(error);
}

// Whether to multiply with wgmma: the device must have it, this library must be built for it, and
// L2RW_CUDA_WARPGROUPS=1 must ask for it. It is not the default because no GPU has run it yet, so
// nothing shows that it is right, and faster than what every architecture has.
inline bool warpgroups_wanted([[maybe_unused]] int32_t device) {
#ifdef L2RW_SM90A
  static const bool asked = [] {
    const char* const value = std::getenv("L2RW_CUDA_WARPGROUPS");
    return value != nullptr && std::string_view(value) == "1";
  }();
  if (!asked) {
    return false;
  }
  int major = 0;
  int minor = 0;
  check_runtime(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check_runtime(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major == 9 && minor == 0;
#else
  return false;
#endif
}

// Makes the device of a tensor current and launches kernels on torch's stream there.
class Launch {
 public:
  Launch(const char* operation, const Tensor& tensor)
      : operation_(operation),
        guard_(tensor.get_device_index()),
        warpgroups_(warpgroups_wanted(tensor.get_device_index())) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    check_runtime(cudaDeviceGetAttribute(
        &processors_, cudaDevAttrMultiProcessorCount, tensor.get_device_index()));
  }

  int64_t processors() const { return processors_; }
  bool warpgroups() const { return warpgroups_; }
  int64_t workspace_bytes() const { return kWorkspaceBytes; }

  // Whether a product of float32 matrices may be rounded to TF32, as set by
  // torch.set_float32_matmul_precision and torch.backends.cuda.matmul.allow_tf32. The stable ABI
  // has no function for it, but torch writes the setting to the cuBLAS handle whenever it returns
  // the handle.
  bool tf32_allowed() const {
    constexpr int kTensorFloat32 = 3;  // CUBLAS_TF32_TENSOR_OP_MATH
    constexpr int kModes = 15;         // the other bits are flags
    if (cublasGetMathMode == nullptr) {
      return false;
    }
    void* handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
    int mode = 0;
    return cublasGetMathMode(handle, &mode) == 0 && (mode & kModes) == kTensorFloat32;
  }

  // Runs kernel(arguments...) on a one-dimensional grid of blocks.
  template <class... Parameters, class... Arguments>
  void run(
      void (*kernel)(Parameters...),
      int64_t blocks,
      dim3 threads,
      int64_t shared_bytes,
      const Arguments&... arguments) const {
    static_assert((sizeof(Parameters) + ...) <= kParameterBytes);
    check(
        blocks <= std::numeric_limits<int32_t>::max(),
        operation_,
        "the arguments need ",
        blocks,
        " blocks of threads, and CUDA has at most 2147483647");
    // A kernel must ask for more than 48 KiB, what it declares itself included.
    if (shared_bytes > 0) {
      check_runtime(cudaFuncSetAttribute(
          reinterpret_cast<const void*>(kernel),
          cudaFuncAttributeMaxDynamicSharedMemorySize,
          static_cast<int>(shared_bytes)));
    }
    kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared_bytes), stream_>>>(
        arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  const char* operation_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int processors_ = 0;
  bool warpgroups_;
};

}  // namespace l2rw::cuda
