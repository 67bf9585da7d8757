#pragma once

// Sums in an order that does not depend on time: no atomics.

#include <cstdint>

namespace l2rw::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// The sum of `value` over `Lanes` consecutive lanes, in each of them.
template <int Lanes, class A>
__device__ __forceinline__ A lane_sum(A value) {
#pragma unroll
  for (int distance = 1; distance < Lanes; distance *= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// The sum of `value` over a block of Threads, in each of them.
template <int Threads, class A>
__device__ __forceinline__ A block_sum(A value) {
  static_assert(Threads % 32 == 0);
  __shared__ A warps[Threads / 32];
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  value = lane_sum<32>(value);
  if (thread % 32 == 0) {
    warps[thread / 32] = value;
  }
  __syncthreads();
  A sum = warps[0];
#pragma unroll
  for (int warp = 1; warp < Threads / 32; ++warp) {
    sum += warps[warp];
  }
  __syncthreads();  // before the next call writes again
  return sum;
}

}  // namespace l2rw::cuda
