#pragma once

// What the threads of a block find out together: sums, and which of them have a nonzero weight. The
// order never depends on timing, so nothing is added up by atomics.

namespace l2rw::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// The sum of `value` over `Lanes` consecutive lanes, in each of them.
template <int Lanes, class A>
__device__ __forceinline__ A warp_sum(A value) {
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
  value = warp_sum<32>(value);
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

// The rank of a thread among those of its block that are active, and how many are.
struct ActiveRank {
  int rank;
  int count;
};

// Before the next call the block must meet at a barrier.
template <int Threads>
__device__ __forceinline__ ActiveRank rank_active(bool is_active) {
  constexpr int kWarps = Threads / 32;
  __shared__ int warp_counts[kWarps];
  const auto thread = static_cast<int>(threadIdx.x);
  const unsigned ballot = __ballot_sync(kAllLanes, is_active);
  if (thread % 32 == 0) {
    warp_counts[thread / 32] = __popc(ballot);
  }
  __syncthreads();
  int rank = __popc(ballot & ((1u << (thread % 32)) - 1));
  int count = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    rank += warp < thread / 32 ? warp_counts[warp] : 0;
    count += warp_counts[warp];
  }
  return {rank, count};
}

}  // namespace l2rw::cuda
