// Kernels with one fault each, and none: what the emulator must notice. Not part of the library.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/instructions.cuh"
#include "cuda/launch.cuh"

namespace l2rw::cuda {
namespace {

constexpr int kThreads = 64;

// Thread k hands thread 63 - k the number k, with the given fault.
enum Fault : int64_t {
  kNone,
  kNoBarrier,
  kBarrierOfSome,
  kTwoBarriers,
  kShuffleOfSome,
  kNoWait,
  kNotClosed,
  kOddAddress,
  kBeyondShared,
};

__global__ void reverse(const float* from, float* to, int64_t fault) {
  auto* const shared = reinterpret_cast<float*>(dynamic_shared_memory());
  const auto thread = static_cast<int>(threadIdx.x);
  const uint32_t base = shared_address(shared);
  if (thread < kThreads / 4) {  // 16 bytes each
    const int odd = fault == kOddAddress ? 1 : 0;
    const uint32_t beyond = fault == kBeyondShared ? 16 : 0;
    copy_vector(
        base + static_cast<uint32_t>(thread) * 16 + beyond,
        reinterpret_cast<const char*>(from + thread * 4 + odd),
        odd == 0 ? 16 : 12);
  }
  if (fault != kNotClosed) {
    close_stage();
  }
  if (fault != kNoWait) {
    wait_for_stage<0>();
  }
  if (fault == kTwoBarriers && thread % 2 == 1) {
    __syncthreads();
  } else if (fault != kNoBarrier && (fault != kBarrierOfSome || thread > 5)) {
    __syncthreads();
  }
  float value = shared[kThreads - 1 - thread];
  if (fault != kShuffleOfSome || thread != 40) {
    value = __shfl_xor_sync(0xffffffffu, value, 0);
  }
  to[thread] = value;
}

Tensor run_fault(const Tensor& from, int64_t fault) {
  const Launch launch("fault", from);
  Tensor to = torch::stable::new_empty(from, {kThreads});
  launch.run(
      &reverse,
      1,
      kThreads,
      kThreads * static_cast<int64_t>(sizeof(float)),
      static_cast<const float*>(from.data_ptr()),
      static_cast<float*>(to.data_ptr()),
      fault);
  return to;
}

}  // namespace
}  // namespace l2rw::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(l2rw_emulated, m) {
  m.def("fault(Tensor numbers, int fault) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(l2rw_emulated, CPU, m) {
  m.impl("fault", TORCH_BOX(&l2rw::cuda::run_fault));
}
