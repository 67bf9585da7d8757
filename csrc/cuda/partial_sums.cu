#include "cuda/partial_sums.h"

#include "cuda/reduce.cuh"
#include "cuda/tile_plan.h"

namespace l2rw::cuda {
namespace {

template <class A, int Threads>
__global__ void __launch_bounds__(Threads) sum_example(
    const A* __restrict__ partial,  // [groups, rows]
    int64_t groups,
    int64_t rows,
    int64_t positions,
    A* __restrict__ u) {  // [rows / positions]
  const int64_t first = blockIdx.x * positions;
  A sum = 0;
  for (int64_t k = threadIdx.x; k < groups * positions; k += Threads) {
    sum += partial[k / positions * rows + first + k % positions];
  }
  sum = block_sum<Threads>(sum);
  if (threadIdx.x == 0) {
    u[blockIdx.x] = sum;
  }
}

constexpr int kPartColumns = 32;
constexpr int kPartRows = 8;

// Eight threads share the parts of a number, so that many parts of few numbers do not wait for each
// other.
template <class A>
__global__ void __launch_bounds__(kPartColumns* kPartRows) sum_part(
    const A* __restrict__ partial,  // [parts, count]
    int64_t parts,
    int64_t count,
    A* __restrict__ total) {  // [count]
  __shared__ A sums[kPartRows][kPartColumns];
  const auto column = static_cast<int>(threadIdx.x);
  const auto row = static_cast<int>(threadIdx.y);
  const int64_t j = int64_t{blockIdx.x} * kPartColumns + column;
  A sum = 0;
  if (j < count) {
#pragma unroll 4
    for (int64_t part = row; part < parts; part += kPartRows) {
      sum += partial[part * count + j];
    }
  }
  sums[row][column] = sum;
  __syncthreads();
  if (row == 0 && j < count) {
#pragma unroll
    for (int other = 1; other < kPartRows; ++other) {
      sum += sums[other][column];
    }
    total[j] = sum;
  }
}

template <class Body>
void with_accumulation_type(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == ScalarType::Double) {
    body(double{});
  } else {
    body(float{});
  }
}

}  // namespace

void sum_positions(
    const Launch& launch, const Tensor& partial, int64_t positions, const Tensor& u) {
  const int64_t groups = partial.size(0);
  const int64_t rows = partial.size(1);
  with_accumulation_type(u, [&](auto zero) {
    using A = decltype(zero);
    const bool few = groups * positions <= 256;
    launch.run(
        few ? &sum_example<A, 32> : &sum_example<A, 256>,
        u.size(0),
        few ? 32 : 256,
        0,
        static_cast<const A*>(data<A>(partial)),
        groups,
        rows,
        positions,
        data<A>(u));
  });
}

void sum_parts(const Launch& launch, const Tensor& partial, const Tensor& total) {
  const int64_t parts = partial.size(0);
  const int64_t count = total.numel();
  with_accumulation_type(total, [&](auto zero) {
    using A = decltype(zero);
    launch.run(
        &sum_part<A>,
        ceil_div(count, kPartColumns),
        dim3(kPartColumns, kPartRows),
        0,
        static_cast<const A*>(data<A>(partial)),
        parts,
        count,
        data<A>(total));
  });
}

}  // namespace l2rw::cuda
