#pragma once

// Examples with weight, in order, found by a block of threads.

#include "cuda/reduce.cuh"

namespace l2rw::cuda {

// Where a thread's example stands among those of the block that have weight, and how many have.
// Before the next call the block must meet at a barrier.
struct ActivePlace {
  int place;
  int count;
};

template <int Threads>
__device__ __forceinline__ ActivePlace place_active(bool has_weight) {
  constexpr int kWarps = Threads / 32;
  __shared__ int warp_counts[kWarps];
  const auto thread = static_cast<int>(threadIdx.x);
  const unsigned ballot = __ballot_sync(kAllLanes, has_weight);
  if (thread % 32 == 0) {
    warp_counts[thread / 32] = __popc(ballot);
  }
  __syncthreads();
  int place = __popc(ballot & ((1u << (thread % 32)) - 1));
  int count = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    place += warp < thread / 32 ? warp_counts[warp] : 0;
    count += warp_counts[warp];
  }
  return {place, count};
}

}  // namespace l2rw::cuda
