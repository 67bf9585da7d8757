#pragma once

// The kernel of example gradients of convolutions with a few channels in each of many groups, by
// ordinary multiply-adds: a tile for tensor cores would be almost empty. kernels.cuh describes its
// outputs.

#include <cstdint>

#include "checks.h"
#include "convolution_sizes.h"
#include "cuda/conv/geometry.h"
#include "cuda/gemm/scheduler.h"
#include "cuda/util/integers.h"
#include "cuda/util/launch.cuh"
#include "cuda/util/vectors.h"

namespace l2rw::cuda {

constexpr int kDirectThreads = 256;
constexpr int kDirectWarps = kDirectThreads / 32;
constexpr int kDirectTaps = 9;            // of one block
constexpr int kPromotionPixels = 128;     // of one warp, before their sum is promoted
constexpr int kPixelStep = kDirectWarps;  // from one pixel of a warp to the next

// The channels of all groups are contiguous, and a lane has one output channel, of whichever group.
struct DirectProblem {
  ImageView z;
  ImageView g;
  ConvolutionGeometry geometry;
  PixelCoord pixel_step;
  int outputs;        // channels of all groups
  int group_outputs;  // channels of a group
  int inputs;         // channels of a group
  int taps;
  int pixels;
  int k_tiles;
  int channel_tiles;
  int tap_tiles;

  int64_t tile_count() const { return int64_t{channel_tiles} * inputs * tap_tiles; }
};

// A block has 32 output channels, one input channel of each group and some taps. Each of its warps
// takes every eighth pixel.
template <class T, class Output>
__global__ void __launch_bounds__(kDirectThreads) direct_gradient_kernel(
    const __grid_constant__ DirectProblem problem,
    int tiles,
    const __grid_constant__ Output output) {
  using A = accumulation_t<T>;
  __shared__ A staged[kDirectWarps][kDirectTaps + 1][32];
  const auto thread = static_cast<int>(threadIdx.x);
  const auto block = static_cast<int>(blockIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int64_t part = block / tiles;
  const int tile = block % tiles;
  const int first_tap = tile % problem.tap_tiles * kDirectTaps;
  const int input = tile / problem.tap_tiles % problem.inputs;
  const int first_output = tile / problem.tap_tiles / problem.inputs * 32;
  const int taps = problem.taps - first_tap < kDirectTaps ? problem.taps - first_tap : kDirectTaps;
  const bool exists = first_output + lane < problem.outputs;
  const int64_t o = exists ? first_output + lane : 0;
  const int64_t c = o / problem.group_outputs * problem.inputs + input;

  TapOffset offsets[kDirectTaps];
#pragma unroll
  for (int t = 0; t < kDirectTaps; ++t) {
    offsets[t] = problem.geometry.tap(first_tap + t);
  }
  const int64_t z_pixel = problem.z.pixel / static_cast<int64_t>(sizeof(T));
  const int64_t g_pixel = problem.g.pixel / static_cast<int64_t>(sizeof(T));

  A total[kDirectTaps + 1] = {};
  for (KTileIterator step = output.steps(part, problem.k_tiles); !step.done(); step.next()) {
    const int64_t example = output.example(step.column_tile());
    const T* const z = reinterpret_cast<const T*>(problem.z.data + example * problem.z.example) + c;
    const T* const g = reinterpret_cast<const T*>(problem.g.data + example * problem.g.example) + o;
    const int first = static_cast<int>(step.k_tile) * kPromotionPixels * kPixelStep;
    const int left = problem.pixels - first;
    const int count = left < kPromotionPixels * kPixelStep ? left : kPromotionPixels * kPixelStep;
    PixelCoord coord = problem.geometry.coord(first + warp);
    A sums[kDirectTaps + 1] = {};
    for (int pixel = warp; pixel < count; pixel += kPixelStep) {
      const A value = static_cast<A>(g[int64_t{first + pixel} * g_pixel]);
#pragma unroll
      for (int t = 0; t < kDirectTaps; ++t) {
        const InputPixel input = problem.geometry.input_pixel(coord, offsets[t]);
        if (t < taps && input.exists) {
          sums[t] += value * static_cast<A>(z[input.number * z_pixel]);
        }
      }
      sums[kDirectTaps] += value;
      coord = problem.geometry.advance(coord, problem.pixel_step);
    }
    const A weight = output.weight(step.column_tile());
#pragma unroll
    for (int t = 0; t <= kDirectTaps; ++t) {
      total[t] += weight * sums[t];
    }
  }
#pragma unroll
  for (int t = 0; t <= kDirectTaps; ++t) {
    staged[warp][t][lane] = total[t];
  }
  __syncthreads();
  const auto sum_of = [&](int t, int channel) {
    A sum = staged[0][t][channel];
#pragma unroll
    for (int w = 1; w < kDirectWarps; ++w) {
      sum += staged[w][t][channel];
    }
    return sum;
  };
  A score = 0;
  for (int x = thread; x < 32 * taps; x += kDirectThreads) {
    const int64_t at = first_output + x / taps;
    if (at < problem.outputs) {
      const int64_t k = (at * problem.inputs + input) * problem.taps + first_tap + x % taps;
      output.write(part, k, sum_of(x % taps, x / taps), score);
    }
  }
  if (input == 0 && first_tap == 0 && thread < 32 && exists) {
    output.write_bias(part, o, sum_of(kDirectTaps, lane), score);
  }
  output.template finish<kDirectThreads>(score);
}

template <class T>
struct DirectKernel {
  using Element = T;
  using Sum = accumulation_t<T>;
  using Problem = DirectProblem;

  static Problem make_problem(
      const Convolution& convolution, const ImageView& z, const ImageView& g) {
    const ConvolutionGeometry geometry = ConvolutionGeometry::of(convolution);
    const int64_t outputs = convolution.groups * convolution.outputs;
    return {
        z,
        g,
        geometry,
        geometry.coord(kPixelStep),
        static_cast<int>(outputs),
        static_cast<int>(convolution.outputs),
        static_cast<int>(convolution.inputs),
        static_cast<int>(convolution.taps()),
        static_cast<int>(convolution.pixels()),
        static_cast<int>(ceil_div(convolution.pixels(), kPromotionPixels * kPixelStep)),
        static_cast<int>(ceil_div(outputs, 32)),
        static_cast<int>(ceil_div(convolution.taps(), kDirectTaps))};
  }
  template <class Output>
  static void run(
      const Launch& launch, const Problem& problem, int64_t parts, const Output& output) {
    launch.run(
        &direct_gradient_kernel<T, Output>,
        problem.tile_count() * parts,
        kDirectThreads,
        0,
        problem,
        static_cast<int>(problem.tile_count()),
        output);
  }
};

}  // namespace l2rw::cuda
