#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "checks.h"
#include "cuda/reduce/block.cuh"
#include "cuda/util/launch.cuh"
#include "cuda/util/types.cuh"

namespace l2rw::cuda {
namespace {

constexpr const char* kOperation = "normalize_weights";
constexpr int kThreads = 256;

// Equation (8): max(u, 0), where NaN and infinities count as zero.
template <class A, class T>
__device__ A rectified(T value) {
  const A score = static_cast<A>(value);
  return isfinite(score) && score > A(0) ? score : A(0);
}

// One block is enough, because a batch has hundreds of scores. Nothing waits for the host.
template <class T>
__global__ void __launch_bounds__(kThreads) normalize(
    const T* __restrict__ u,  // [n], stride
    int64_t stride,
    T* __restrict__ w,  // [n]
    int64_t n) {
  using A = accumulation_t<T>;
  A scale = 1;
  A sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    sum += rectified<A>(u[i * stride]);
  }
  sum = block_sum<kThreads>(sum);
  if (!isfinite(sum)) {  // the sum overflows: scale down first
    scale = A(1) / static_cast<A>(n);
    sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      sum += rectified<A>(u[i * stride]) * scale;
    }
    sum = block_sum<kThreads>(sum);
  }
  // Equation (9); all weights are zero where the sum is.
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const A score = rectified<A>(u[i * stride]);
    w[i] = static_cast<T>(score > A(0) ? score * scale / sum : A(0));
  }
}

Tensor normalize_weights(const Tensor& u) {
  check_dim(kOperation, {"u", u}, 1);
  check_floating(kOperation, {"u", u});
  const Launch launch(kOperation, u);
  Tensor w = torch::stable::new_empty(u, {u.size(0)});
  if (u.size(0) == 0) {
    return w;
  }
  dispatch_device_type(u.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch.run(&normalize<T>, 1, kThreads, 0, data<T>(u), u.stride(0), data<T>(w), u.size(0));
  });
  return w;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) {
  m.impl("normalize_weights", TORCH_BOX(&normalize_weights));
}

}  // namespace l2rw::cuda
