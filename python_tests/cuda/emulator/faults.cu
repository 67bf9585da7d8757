// Kernels with one fault each, and none: what the emulator must notice. Not part of the library.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/gemm/tile.h"
#include "cuda/util/launch.cuh"
#include "cuda/util/ptx.cuh"

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
  auto* const shared = reinterpret_cast<float*>(dynamic_shared_memory<16>());
  const auto thread = static_cast<int>(threadIdx.x);
  const uint32_t base = shared_address(shared);
  if (thread < kThreads / 4) {  // 16 bytes each
    const int odd = fault == kOddAddress ? 1 : 0;
    const uint32_t beyond = fault == kBeyondShared ? 16 : 0;
    cp_async(
        base + static_cast<uint32_t>(thread) * 16 + beyond,
        reinterpret_cast<const char*>(from + thread * 4 + odd),
        odd == 0 ? 16 : 12);
  }
  if (fault != kNotClosed) {
    cp_async_commit();
  }
  if (fault != kNoWait) {
    cp_async_wait<0>();
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

// A product of one warpgroup, 64 rows of A by 192 of B, with the given fault.
enum ProductFault : int64_t {
  kNoProductFault,
  kNotShown,
  kShownTooEarly,
  kReadTooEarly,
  kOverwritten,
  kNotWaitedFor,
  kSomeLanes,
  kNoFence,
  kOtherMatrix,
  kSomeWarps,
};

__global__ void multiply_rows(const char* from, float* to, int64_t fault) {
  constexpr int kRows = 64 + 192;
  const char* const shared = dynamic_shared_memory<1024>();
  const auto thread = static_cast<int>(threadIdx.x);
  const uint32_t base = shared_address(shared);
  for (int row = thread; row < kRows; row += 128) {
    for (int vector = 0; vector < kDepthVectors; ++vector) {
      const int at = row * kDepthBytes + vector * kVectorBytes;
      cp_async(base + static_cast<uint32_t>(swizzled_offset(row, vector)), from + at, 16);
    }
  }
  cp_async_commit();
  if (fault == kShownTooEarly) {
    fence_async_proxy();
  }
  cp_async_wait<0>();
  if (fault != kShownTooEarly && (fault != kNotShown || thread != 7)) {
    fence_async_proxy();
  }
  __syncthreads();
  float sums[2][48] = {};
  if (fault != kNoFence) {
    wgmma_fence();
  }
  for (int vector = 0; vector < kDepthVectors; vector += 2) {
    const bool takes_part = (fault != kSomeLanes || thread % 32 != 3) &&
                            (fault != kSomeWarps || thread / 32 != 2 || vector == 0);
    const int row = fault == kOtherMatrix && thread / 32 == 2 ? 64 + 8 : 64;
    if (takes_part) {
      wgmma<__nv_bfloat16>(
          sums, matrix_descriptor(base, 0, vector), matrix_descriptor(base, row, vector));
    }
  }
  wgmma_commit();
  if (fault == kOverwritten) {
    __syncthreads();
    for (int byte = thread; byte < kRows * kDepthBytes; byte += 128) {
      dynamic_shared_memory<1024>()[byte] = 0;
    }
    __syncthreads();
  }
  const auto store = [&] {
    for (int r = 0; r < 2; ++r) {
      for (int c = 0; c < 48; ++c) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + r * 8;
        to[row * 192 + c / 2 * 8 + thread % 4 * 2 + c % 2] = sums[r][c];
      }
    }
  };
  if (fault == kReadTooEarly) {
    store();
  }
  if (fault != kNotWaitedFor) {
    wgmma_wait<0>();
  }
  if (fault != kReadTooEarly) {
    store();
  }
}

Tensor run_product(const Tensor& rows, int64_t fault) {
  const Launch launch("product", rows);
  Tensor to = torch::stable::new_empty(rows, {64, 192}, ScalarType::Float);
  launch.run(
      &multiply_rows,
      1,
      128,
      (64 + 192) * kDepthBytes,
      static_cast<const char*>(rows.data_ptr()),
      static_cast<float*>(to.data_ptr()),
      fault);
  return to;
}

}  // namespace
}  // namespace l2rw::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(l2rw_emulated, m) {
  m.def("fault(Tensor numbers, int fault) -> Tensor");
  m.def("product(Tensor rows, int fault) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(l2rw_emulated, CPU, m) {
  m.impl("fault", TORCH_BOX(&l2rw::cuda::run_fault));
  m.impl("product", TORCH_BOX(&l2rw::cuda::run_product));
}
