#include "cuda/reduce/partial_sums.cuh"

#include <cstdint>

#include "cuda/util/grouped.h"
#include "cuda/reduce/block.cuh"
#include "cuda/util/integers.h"

namespace l2rw::cuda {
namespace {

template <class A>
struct Rows {
  const A* sums;  // [parts, rows]
  int64_t rows;
  int64_t positions;
};

template <class A, int Capacity>
using RowLayers = GroupedLayers<Rows<A>, Capacity>;

// The terms of an example are numbered layer by layer, then part by part.
template <class A, int Threads, int Capacity>
__global__ void __launch_bounds__(Threads) sum_example(
    const __grid_constant__ RowLayers<A, Capacity> layers,
    bool add,
    A* __restrict__ u) {  // [rows / positions]
  A sum = 0;
  for (int64_t k = threadIdx.x; k < layers.total; k += Threads) {
    const int l = layers.layer_of(k);
    const Rows<A>& layer = layers.entries[l];
    const int64_t term = k - layers.first[l];
    sum += layer.sums
               [term / layer.positions * layer.rows + blockIdx.x * layer.positions +
                term % layer.positions];
  }
  sum = block_sum<Threads>(sum);
  if (threadIdx.x == 0) {
    u[blockIdx.x] = add ? u[blockIdx.x] + sum : sum;
  }
}

constexpr int kPartColumns = 32;
constexpr int kPartRows = 8;

// Eight threads share the parts of one number, so that the loads of many parts of few numbers do
// not wait for each other.
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

}  // namespace

void sum_layers(
    const Launch& launch,
    const Tensor& workspace,
    const std::vector<LayerRowSums>& layers,
    bool add,
    const Tensor& u) {
  dispatch_accumulation(u.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const int64_t n = u.size(0);
    const auto run = [&](auto grouped) {
      constexpr int kCapacity = decltype(grouped)::kCapacity;
      for (const LayerRowSums& layer : layers) {
        grouped.add(
            {data<A>(workspace) + layer.offset, n * layer.positions, layer.positions},
            layer.parts * layer.positions);
      }
      const bool few = grouped.total <= 256;
      launch.run(
          few ? &sum_example<A, 32, kCapacity> : &sum_example<A, 256, kCapacity>,
          n,
          few ? 32 : 256,
          0,
          grouped,
          add,
          data<A>(u));
    };
    if (layers.size() == 1) {
      run(RowLayers<A, 1>{});
    } else {
      run(RowLayers<A, kMaxLayers>{});
    }
  });
}

void sum_parts(const Launch& launch, const Tensor& partial, const Tensor& total) {
  const int64_t parts = partial.size(0);
  const int64_t count = total.numel();
  if (count == 0) {
    return;
  }
  dispatch_accumulation(total.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    launch.run(
        &sum_part<A>,
        ceil_div(count, kPartColumns),
        dim3(kPartColumns, kPartRows),
        0,
        data<A>(partial),
        parts,
        count,
        data<A>(total));
  });
}

}  // namespace l2rw::cuda
