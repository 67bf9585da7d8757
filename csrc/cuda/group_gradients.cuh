#pragma once

// Gradients of convolutions with a few channels in each of many groups, by ordinary multiply-adds:
// a tile for tensor cores would be all but empty. Outputs: example_products.cuh.

#include "cuda/gradient_tile.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"

namespace l2rw::cuda {

constexpr int kGroupThreads = 256;
constexpr int kGroupWarps = kGroupThreads / 32;
constexpr int kGroupTaps = 9;            // of one block
constexpr int kGroupPixels = 128;        // of one warp, before their sum is handed over
constexpr int kGroupStep = kGroupWarps;  // from one pixel of a warp to the next

// Channels of all groups lie side by side: a lane has one output channel, whatever its group.
struct GroupLayer {
  Pixels z;
  Pixels g;
  ConvolutionIndex index;
  OutputPlace step;
  int outputs;        // channels of all groups
  int group_outputs;  // channels of a group
  int inputs;         // channels of a group
  int taps;
  int pixels;
  int chunks;
  int channel_tiles;
  int tap_tiles;

  int64_t tile_count() const { return int64_t{channel_tiles} * inputs * tap_tiles; }
  int64_t size() const { return int64_t{outputs} * inputs * taps; }
  int64_t bias_size() const { return outputs; }
};

// 32 output channels, one input channel of each group, some taps; a warp for every eighth pixel.
template <class T, class Output>
__global__ void __launch_bounds__(kGroupThreads) form_group_tiles(
    const __grid_constant__ GroupLayer layer, int tiles, const __grid_constant__ Output output) {
  using A = accumulation_t<T>;
  __shared__ A staged[kGroupWarps][kGroupTaps + 1][32];
  const auto thread = static_cast<int>(threadIdx.x);
  const auto block = static_cast<int>(blockIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int64_t part = block / tiles;
  const int tile = block % tiles;
  const int first_tap = tile % layer.tap_tiles * kGroupTaps;
  const int input = tile / layer.tap_tiles % layer.inputs;
  const int first_output = tile / layer.tap_tiles / layer.inputs * 32;
  const int taps = layer.taps - first_tap < kGroupTaps ? layer.taps - first_tap : kGroupTaps;
  const bool exists = first_output + lane < layer.outputs;
  const int64_t o = exists ? first_output + lane : 0;
  const int64_t c = o / layer.group_outputs * layer.inputs + input;

  TapOffset offsets[kGroupTaps];
#pragma unroll
  for (int t = 0; t < kGroupTaps; ++t) {
    offsets[t] = layer.index.tap(first_tap + t);
  }
  const int64_t z_pixel = layer.z.pixel / static_cast<int64_t>(sizeof(T));
  const int64_t g_pixel = layer.g.pixel / static_cast<int64_t>(sizeof(T));

  A total[kGroupTaps + 1] = {};
  for (Walk walk = output.walk(part, layer.chunks); !walk.done(); walk.next()) {
    const int64_t example = output.example(walk.column_tile());
    const T* const z = reinterpret_cast<const T*>(layer.z.data + example * layer.z.example) + c;
    const T* const g = reinterpret_cast<const T*>(layer.g.data + example * layer.g.example) + o;
    const int first = static_cast<int>(walk.chunk) * kGroupPixels * kGroupStep;
    const int left = layer.pixels - first;
    const int count = left < kGroupPixels * kGroupStep ? left : kGroupPixels * kGroupStep;
    OutputPlace place = layer.index.place(first + warp);
    A sums[kGroupTaps + 1] = {};
    for (int pixel = warp; pixel < count; pixel += kGroupStep) {
      const A value = static_cast<A>(g[int64_t{first + pixel} * g_pixel]);
#pragma unroll
      for (int t = 0; t < kGroupTaps; ++t) {
        const int met = t < taps ? layer.index.input_pixel(place, offsets[t]) : -1;
        if (met >= 0) {
          sums[t] += value * static_cast<A>(z[int64_t{met} * z_pixel]);
        }
      }
      sums[kGroupTaps] += value;
      place = layer.index.after(place, layer.step);
    }
    const A weight = output.weight(walk.column_tile());
#pragma unroll
    for (int t = 0; t <= kGroupTaps; ++t) {
      total[t] += weight * sums[t];
    }
  }
#pragma unroll
  for (int t = 0; t <= kGroupTaps; ++t) {
    staged[warp][t][lane] = total[t];
  }
  __syncthreads();
  const auto sum_of = [&](int t, int channel) {
    A sum = staged[0][t][channel];
#pragma unroll
    for (int w = 1; w < kGroupWarps; ++w) {
      sum += staged[w][t][channel];
    }
    return sum;
  };
  A score = 0;
  for (int x = thread; x < 32 * taps; x += kGroupThreads) {
    const int64_t at = first_output + x / taps;
    if (at < layer.outputs) {
      const int64_t k = (at * layer.inputs + input) * layer.taps + first_tap + x % taps;
      output.write(part, k, sum_of(x % taps, x / taps), score);
    }
  }
  if (input == 0 && first_tap == 0 && thread < 32 && exists) {
    output.write_bias(part, o, sum_of(kGroupTaps, lane), score);
  }
  output.template finish<kGroupThreads>(score);
}

template <class T>
struct GroupKernel {
  using Element = T;
  using Sum = accumulation_t<T>;
  using Layer = GroupLayer;

  static Layer lay_out(const Convolution& convolution, const Pixels& z, const Pixels& g) {
    const ConvolutionIndex index = ConvolutionIndex::of(convolution);
    const int64_t outputs = convolution.groups * convolution.outputs;
    return {
        z,
        g,
        index,
        index.place(kGroupStep),
        static_cast<int>(outputs),
        static_cast<int>(convolution.outputs),
        static_cast<int>(convolution.inputs),
        static_cast<int>(convolution.taps()),
        static_cast<int>(convolution.pixels()),
        static_cast<int>(ceil_div(convolution.pixels(), kGroupPixels * kGroupStep)),
        static_cast<int>(ceil_div(outputs, 32)),
        static_cast<int>(ceil_div(convolution.taps(), kGroupTaps))};
  }
  template <class Output>
  static void run(const Launch& launch, const Layer& layer, int64_t parts, const Output& output) {
    launch.run(
        &form_group_tiles<T, Output>,
        layer.tile_count() * parts,
        kGroupThreads,
        0,
        layer,
        static_cast<int>(layer.tile_count()),
        output);
  }
};

}  // namespace l2rw::cuda
