#pragma once

// Gradients of single examples, G_i, formed and handed to an Output without being stored on the
// way. An Output says which examples a block adds up, and takes their sum number by number:
//
//   Walk walk(part, chunks)           the steps of one of the parts of the examples
//   example(k), weight(k)             of place k of a walk
//   write(part, k, value, score)      number k of the gradient
//   write_bias(part, o, value, score)
//   finish<Threads>(score)            called by all threads, each with its score

#include <algorithm>

#include "cuda/gradient_engines.cuh"
#include "cuda/launch.cuh"

namespace l2rw::cuda {

template <class Engine>
constexpr int64_t kGradientSharedBytes =
    std::max(kSharedBytes<Engine>, kStagedBytes<typename Engine::Tile, typename Engine::Sum>);

// Brings the sums of all threads of a tile together, in the order of the gradient.
template <class Tile, class A>
__device__ __forceinline__ void stage_sums(
    const Sums<Tile, A>& sums, const Rectangle& rectangle, A* numbers, A* bias) {
  const auto thread = static_cast<int>(threadIdx.x);
  A g_sums[Tile::kThreadRows];
#pragma unroll
  for (int r = 0; r < Tile::kThreadRows; ++r) {
    g_sums[r] = sums[r][Tile::kBias];
    if constexpr (!Tile::kPlain) {
      g_sums[r] = lane_sum<Tile::kLanesAcross>(g_sums[r]);
    }
  }
  for (int deep = 0; deep < Tile::kDeep; ++deep) {
    __syncthreads();  // the first time: all have read their last stage
    if (Tile::deep(thread) == deep) {
      const auto put = [deep](A& to, A value) { to = deep == 0 ? value : to + value; };
#pragma unroll
      for (int c = 0; c < Tile::kProductColumns; ++c) {
        const int column = Tile::column(thread, c);
        const int vector = column / Tile::kNumbers;
        if (rectangle.has(vector)) {
          const int place = rectangle.place(vector, column % Tile::kNumbers, Tile::kNumbers);
#pragma unroll
          for (int r = 0; r < Tile::kThreadRows; ++r) {
            put(numbers[Tile::row(thread, r) * kStagedPitch<Tile> + place], sums[r][c]);
          }
        }
      }
      if (Tile::warp_vector(thread) == 0 && thread % Tile::kLanesAcross == 0) {
#pragma unroll
        for (int r = 0; r < Tile::kThreadRows; ++r) {
          put(bias[Tile::row(thread, r)], g_sums[r]);
        }
      }
    }
  }
  __syncthreads();
}

// One tile of the gradient, summed over a part of the examples.
template <class Engine, class Output>
__global__ void __launch_bounds__(Engine::Tile::kThreads, Engine::kBlocks) form_tiles(
    const __grid_constant__ GradientLayer layer, int tiles, const __grid_constant__ Output output) {
  using Tile = typename Engine::Tile;
  using A = typename Engine::Sum;
  char* const shared = dynamic_shared_memory();
  const auto thread = static_cast<int>(threadIdx.x);
  const auto block = static_cast<int>(blockIdx.x);
  const int64_t part = block / tiles;
  const GradientPlace place = gradient_place<Tile>(layer, block % tiles);
  const auto weight = [&](int64_t k) { return output.weight(k); };
  GradientLoader<Tile> loader(layer, place, thread);
  WeightedSums<Tile, A, decltype(weight)> result(weight);
  multiply<Engine>(
      shared,
      output.walk(part, layer.chunks),
      [&](const Walk& step, const auto& copy) {
        loader.load(output.example(step.column_tile()), step.chunk, copy);
      },
      result);
  A* const numbers = reinterpret_cast<A*>(shared);
  A* const bias = numbers + Tile::kRows * kStagedPitch<Tile>;
  stage_sums<Tile, A>(result.total, place.rectangle, numbers, bias);
  A score = 0;
  const int64_t row_size = int64_t{layer.inputs} * layer.tiles.taps;
  for_each_number<Tile>(layer, place, thread, [&](int row, int x, int64_t at) {
    const int64_t k = place.output(layer, row) * row_size + at;
    output.write(part, k, numbers[row * kStagedPitch<Tile> + x], score);
  });
  if (place.column_tile == 0) {
    for (int row = thread; row < Tile::kRows; row += Tile::kThreads) {
      if (place.first_output + row < layer.outputs) {
        output.write_bias(part, place.output(layer, row), bias[row], score);
      }
    }
  }
  output.template finish<Tile::kThreads>(score);
}

template <class EngineType>
struct TileKernel {
  using Engine = EngineType;
  using Element = typename Engine::Element;
  using Sum = typename Engine::Sum;
  using Layer = GradientLayer;

  static Layer lay_out(const Convolution& convolution, const Pixels& z, const Pixels& g) {
    return lay_out_gradient<typename Engine::Tile>(convolution, z, g);
  }
  template <class Output>
  static void run(const Launch& launch, const Layer& layer, int64_t parts, const Output& output) {
    launch.run(
        &form_tiles<Engine, Output>,
        layer.tile_count() * parts,
        Engine::Tile::kThreads,
        kGradientSharedBytes<Engine>,
        layer,
        static_cast<int>(layer.tile_count()),
        output);
  }
};

}  // namespace l2rw::cuda
