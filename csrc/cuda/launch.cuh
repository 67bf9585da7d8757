#pragma once

// What every launch needs: device, stream, processors, checks.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <limits>

#include "checks.h"
#include "cuda/tile_plan.h"
#include "cuda/warpgroups.h"

namespace l2rw::cuda {

// What every driver and architecture takes as arguments of a kernel.
constexpr size_t kParameterBytes = 4096;

// The device of a tensor made current, and torch's stream on it.
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
    STD_CUDA_CHECK(cudaDeviceGetAttribute(
        &processors_, cudaDevAttrMultiProcessorCount, tensor.get_device_index()));
  }

  int64_t processors() const { return processors_; }
  bool warpgroups() const { return warpgroups_; }
  int64_t workspace_bytes() const { return kWorkspaceBytes; }

  // Runs kernel(arguments...) on a line of blocks.
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
    // More than 48 KiB, together with what the kernel declares itself, must be asked for.
    if (shared_bytes > 0) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(
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
