#pragma once

// The kernel that forms the gradients of single examples, G_i, tile by tile, and the choice between
// it and the direct kernel. Both hand a gradient to an Output and do not store it before. An Output
// says which examples a block adds up, and takes their sum element by element:
//
//   KTileIterator steps(part, k_tiles)  the steps of one part of the examples
//   example(k), weight(k)               of the k-th example, the column tile of a step
//   write(part, k, value, score)        element k of the gradient
//   write_bias(part, o, value, score)
//   finish<Threads>(score)              called by all threads, each with its score

#include <algorithm>
#include <cstdint>

#include "checks.h"
#include "convolution_sizes.h"
#include "cuda/conv/aligned_image.cuh"
#include "cuda/conv_grad/direct.cuh"
#include "cuda/conv_grad/mma.cuh"
#include "cuda/conv_grad/tile.h"
#include "cuda/gemm/dispatch.cuh"
#include "cuda/gemm/mainloop.cuh"
#include "cuda/gemm/scheduler.h"
#include "cuda/gemm/tile.h"
#include "cuda/reduce/block.cuh"
#include "cuda/util/launch.cuh"
#include "cuda/util/types.cuh"
#include "cuda/util/vectors.h"

namespace l2rw::cuda {

// The epilogue adds up examples, or parts of them, each with its weight: `weight(column tile)`.
template <class Tile, class A, class Weight>
struct WeightedEpilogue {
  const Weight& weight;
  Accumulators<Tile, A> total;

  __device__ __forceinline__ explicit WeightedEpilogue(const Weight& weight) : weight(weight) {
    clear<Tile, A>(total);
  }
  __device__ __forceinline__ bool is_due(const KTileIterator& step) const {
    return step.ends_work_tile();
  }
  __device__ __forceinline__ void consume(
      const KTileIterator& step, const Accumulators<Tile, A>& sums) {
    const A w = weight(step.column_tile());
#pragma unroll
    for (int r = 0; r < Tile::kThreadRows; ++r) {
#pragma unroll
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        total[r][c] += w * sums[r][c];
      }
    }
  }
};

template <class Mma>
constexpr int64_t kGradientSharedBytes =
    std::max(kSharedBytes<Mma>, kStagedBytes<typename Mma::Tile, typename Mma::Sum>);

// Stages the sums of all threads of a tile in shared memory, in the order of the gradient.
template <class Tile, class A>
__device__ __forceinline__ void stage_sums(
    const Accumulators<Tile, A>& sums, const TileColumns& columns, A* staged, A* staged_bias) {
  const auto thread = static_cast<int>(threadIdx.x);
  A g_sums[Tile::kThreadRows];
#pragma unroll
  for (int r = 0; r < Tile::kThreadRows; ++r) {
    g_sums[r] = sums[r][Tile::kBias];
    if constexpr (!Tile::kSimt) {
      g_sums[r] = warp_sum<Tile::kLanesN>(g_sums[r]);
    }
  }
  for (int slice = 0; slice < Tile::kSlicesK; ++slice) {
    __syncthreads();  // the first time, all threads have then read their last stage
    if (Tile::slice_k(thread) == slice) {
      const auto put = [slice](A& to, A value) { to = slice == 0 ? value : to + value; };
#pragma unroll
      for (int c = 0; c < Tile::kProductColumns; ++c) {
        const int column = Tile::column(thread, c);
        const int vector = column / Tile::kElements;
        if (columns.has(vector)) {
          const int offset = columns.offset(vector, column % Tile::kElements, Tile::kElements);
#pragma unroll
          for (int r = 0; r < Tile::kThreadRows; ++r) {
            put(staged[Tile::row(thread, r) * kStagedPitch<Tile> + offset], sums[r][c]);
          }
        }
      }
      if (Tile::warp_vector(thread) == 0 && thread % Tile::kLanesN == 0) {
#pragma unroll
        for (int r = 0; r < Tile::kThreadRows; ++r) {
          put(staged_bias[Tile::row(thread, r)], g_sums[r]);
        }
      }
    }
  }
  __syncthreads();
}

// One tile of the gradient, summed over a part of the examples.
template <class Mma, class Output>
__global__ void __launch_bounds__(Mma::Tile::kThreads, Mma::kMinBlocks) gradient_kernel(
    const __grid_constant__ GradientProblem problem,
    int tiles,
    const __grid_constant__ Output output) {
  using Tile = typename Mma::Tile;
  using A = typename Mma::Sum;
  char* const shared = shared_stages<Mma>();
  const auto thread = static_cast<int>(threadIdx.x);
  const auto block = static_cast<int>(blockIdx.x);
  const int64_t part = block / tiles;
  const GradientTileCoord tile = tile_coord<Tile>(problem, block % tiles);
  const auto weight = [&](int64_t k) { return output.weight(k); };
  GradientLoader<Tile> loader(problem, tile, thread);
  WeightedEpilogue<Tile, A, decltype(weight)> epilogue(weight);
  run_mainloop<Mma>(
      shared,
      output.steps(part, problem.k_tiles),
      [&](const KTileIterator& step, const auto& copy) {
        loader.load(output.example(step.column_tile()), step.k_tile, copy);
      },
      epilogue);
  A* const staged = reinterpret_cast<A*>(shared);
  A* const staged_bias = staged + Tile::kRows * kStagedPitch<Tile>;
  stage_sums<Tile, A>(epilogue.total, tile.columns, staged, staged_bias);
  A score = 0;
  const int64_t row_size = int64_t{problem.inputs} * problem.tiling.taps;
  for_each_element<Tile>(problem, tile, thread, [&](int row, int x, int64_t offset) {
    const int64_t k = tile.output(problem, row) * row_size + offset;
    output.write(part, k, staged[row * kStagedPitch<Tile> + x], score);
  });
  if (tile.column_tile == 0) {
    for (int row = thread; row < Tile::kRows; row += Tile::kThreads) {
      if (tile.first_output + row < problem.outputs) {
        output.write_bias(part, tile.output(problem, row), staged_bias[row], score);
      }
    }
  }
  output.template finish<Tile::kThreads>(score);
}

template <class MmaType>
struct TiledKernel {
  using Mma = MmaType;
  using Element = typename Mma::Element;
  using Sum = typename Mma::Sum;
  using Problem = GradientProblem;

  static Problem make_problem(
      const Convolution& convolution, const ImageView& z, const ImageView& g) {
    return make_gradient_problem<typename Mma::Tile>(convolution, z, g);
  }
  template <class Output>
  static void run(
      const Launch& launch, const Problem& problem, int64_t parts, const Output& output) {
    launch.run(
        &gradient_kernel<Mma, Output>,
        problem.tile_count() * parts,
        Mma::Tile::kThreads,
        kGradientSharedBytes<Mma>,
        problem,
        static_cast<int>(problem.tile_count()),
        output);
  }
};

// So many output channels of a group the narrow tile holds.
constexpr int64_t kNarrowTileOutputs = 16;
// Up to so many pairs of channels in a group, of several, tensor cores would find little to do.
constexpr int64_t kFewPairs = 16;

// There are three tiles: one of 128 output channels, for sums over many examples of wide layers;
// one of 64; and, for at most 16, one whose four warps share the pixels of a stage.
template <
    class T,
    Access Kind,
    template <class Element, class Tile, int PromotionPixels, int MinBlocks> class Mma,
    int PromotionPixels>
struct GradientTiles {
  static constexpr bool kByGroup = true;  // the rows of images are those of one group
  static constexpr int kBytes = static_cast<int>(sizeof(T));
  template <int RowFragments, int WarpsM, int WarpsN, int SlicesK, int Depth>
  using Tile = GradientTile<kBytes, Kind, RowFragments, WarpsM, WarpsN, SlicesK, Depth>;
  using Large = TiledKernel<Mma<T, Tile<2, 4, 2, 1, 64 / kBytes>, PromotionPixels, 1>>;
  using Small = TiledKernel<Mma<T, Tile<1, 4, 1, 1, 128 / kBytes>, PromotionPixels, 3>>;
  using Narrow = TiledKernel<Mma<T, Tile<1, 1, 1, 4, 128 / kBytes>, PromotionPixels, 3>>;
};

template <class Config>
struct TiledKernels;
template <class T>
struct TiledKernels<SimtConfig<T>>
    : GradientTiles<T, Access::simt, GradientSimtMma, 512 / static_cast<int>(sizeof(T))> {};
template <class T>
struct TiledKernels<TensorCoreConfig<T>>
    : GradientTiles<T, Access::ldmatrix, GradientTensorCoreMma, 512> {};
template <>
struct TiledKernels<TensorCoreConfig<float>>
    : GradientTiles<float, Access::scalars, GradientTensorCoreMma, 256> {};

template <class T>
struct DirectKernels {
  static constexpr bool kByGroup = false;
  using Large = DirectKernel<T>;
  using Small = DirectKernel<T>;
  using Narrow = DirectKernel<T>;
};

// Calls body(Kernels{}) for a layer with groups and pixels.
template <class Body>
void with_gradient_kernels(
    const Launch& launch, ScalarType dtype, const Convolution& convolution, const Body& body) {
  const int64_t pairs = convolution.inputs * convolution.outputs;
  if (convolution.groups > 1 && pairs > 0 && pairs <= kFewPairs) {
    dispatch_device_type(dtype, [&](auto zero) { body(DirectKernels<decltype(zero)>{}); });
  } else {
    with_config(launch, dtype, [&](auto config) { body(TiledKernels<decltype(config)>{}); });
  }
}

// The kernels count pixels, and the weights of an output channel, in 32 bits.
inline void check_countable(
    const char* operation, const Convolution& convolution, const Tensor& z, const Tensor& g) {
  check_image_size(operation, convolution, z);
  constexpr int64_t kMax = int64_t{1} << 29;
  check(
      g.size(1) <= kMax && z.size(1) * convolution.taps() <= kMax,
      operation,
      "g must have at most ",
      kMax,
      " channels on CUDA, and z as many times the taps, got shapes ",
      shape_of(g),
      " and ",
      shape_of(z));
}

}  // namespace l2rw::cuda
