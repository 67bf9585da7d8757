#include "correlation.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "checks.h"

namespace l2rw {
namespace {

constexpr const char* kOperation = "normalize_weights";
constexpr int kThreads = 256;

template <class T>
struct Cuda {
  using type = T;
};
template <>
struct Cuda<BFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct Cuda<Half> {
  using type = __half;
};

// Equation (8): max(u, 0), where NaN and infinities count as zero.
template <class A, class T>
__device__ A rectified(T value) {
  const A score = static_cast<A>(value);
  return isfinite(score) && score > A(0) ? score : A(0);
}

// The sum of `value` over the block, the same in every thread and from run to run.
template <class A>
__device__ A block_sum(A value) {
  __shared__ A partial[kThreads];
  partial[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      partial[threadIdx.x] += partial[threadIdx.x + half];
    }
    __syncthreads();
  }
  const A sum = partial[0];
  __syncthreads();
  return sum;
}

// One block: a batch has hundreds of scores, and nothing waits for the host.
template <class T, class A>
__global__ void normalize(
    const T* __restrict__ u,  // [n], stride
    int64_t stride,
    T* __restrict__ w,  // [n]
    int64_t n) {
  A scale = 1;
  A sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    sum += rectified<A>(u[i * stride]);
  }
  sum = block_sum(sum);
  if (!isfinite(sum)) {  // overflow: scale down first
    scale = A(1) / static_cast<A>(n);
    sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      sum += rectified<A>(u[i * stride]) * scale;
    }
    sum = block_sum(sum);
  }
  // Equation (9); all weights are zero where the sum is.
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const A score = rectified<A>(u[i * stride]);
    w[i] = static_cast<T>(score > A(0) ? score * scale / sum : A(0));
  }
}

}  // namespace

Tensor normalize_weights(const Tensor& u) {
  check_dim(kOperation, {"u", u}, 1);
  check_floating(kOperation, {"u", u});
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  Tensor w = torch::stable::new_empty(u, {u.size(0)});
  if (u.size(0) == 0) {
    return w;
  }
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(u.get_device_index(), &stream));
  dispatch_floating(u.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using C = typename Cuda<T>::type;
    normalize<C, accumulation_t<T>><<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        data<C>(u), u.stride(0), data<C>(w), u.size(0));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return w;
}

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) {
  m.impl("normalize_weights", TORCH_BOX(&normalize_weights));
}

}  // namespace l2rw
