#include "cuda/narrow_convolution.h"

#include "cuda/convolution_index.h"
#include "cuda/divisor.h"
#include "cuda/partial_sums.h"
#include "cuda/reduce.cuh"
#include "cuda/sheets.h"
#include "cuda/types.cuh"

namespace l2rw::cuda {
namespace {

// Strides in elements.
struct ImageStrides {
  int64_t example;
  int64_t channel;
  int64_t space[3];
};

ImageStrides strides_of(const Tensor& tensor) {
  ImageStrides strides{tensor.stride(0), tensor.stride(1), {0, 0, 0}};
  const int64_t dims = tensor.dim() - 2;
  for (int64_t d = 0; d < dims; ++d) {
    strides.space[3 - dims + d] = tensor.stride(2 + d);
  }
  return strides;
}

template <class T, class A>
struct NarrowLayer {
  ConvolutionIndex index;
  const T* z;          // [n, C, *s]
  const T* g;          // [n, O, *p]
  const A* direction;  // [O, inputs, *k]
  ImageStrides z_strides;
  ImageStrides g_strides;
  int64_t V_output;  // elements from output channel to output channel
  int64_t V_term;    // from number to number of an output channel
  Either bias;       // [O]
  bool has_bias;
  int32_t inputs;   // channels of a group
  Divisor outputs;  // channels of a group
  Divisor across;   // out[2]
  Divisor down;     // out[1]
};

// g . (V * z + V_b) at Count neighbouring channels, first of which is `output`, of one pixel. More
// than one: of depthwise convolutions, whose channels lie side by side.
template <int Count, class T, class A>
__device__ __forceinline__ A correlate_pixel(
    const NarrowLayer<T, A>& layer, const T* z, const T* g, int32_t output, int32_t pixel) {
  const ConvolutionIndex& index = layer.index;
  const int32_t row = layer.across.divide(pixel);
  const int32_t plane = layer.down.divide(row);
  const OutputPlace place{
      {plane, row - plane * layer.down.divisor(), pixel - row * layer.across.divisor()}};
  A sums[Count];
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    sums[k] = layer.has_bias ? layer.bias.template load<T, A>(output + k) : A(0);
  }
  const int32_t first_input = layer.outputs.divide(output) * layer.inputs;
  const A* V = layer.direction + output * layer.V_output;
  for (int32_t c = first_input; c < first_input + layer.inputs; ++c) {
    for (int k0 = 0; k0 < index.kernel[0]; ++k0) {
      const int at0 = place.at[0] * index.stride[0] - index.padding[0] + k0 * index.dilation[0];
      for (int k1 = 0; k1 < index.kernel[1]; ++k1) {
        const int at1 = place.at[1] * index.stride[1] - index.padding[1] + k1 * index.dilation[1];
        const bool inside = 0 <= at0 && at0 < index.in[0] && 0 <= at1 && at1 < index.in[1];
        const T* const line = z + c * layer.z_strides.channel + at0 * layer.z_strides.space[0] +
                              at1 * layer.z_strides.space[1];
        for (int k2 = 0; k2 < index.kernel[2]; ++k2, V += layer.V_term) {
          const int at2 = place.at[2] * index.stride[2] - index.padding[2] + k2 * index.dilation[2];
          if (inside && 0 <= at2 && at2 < index.in[2]) {
            const auto inputs =
                *reinterpret_cast<const Pack<T, Count>*>(line + at2 * layer.z_strides.space[2]);
            const auto weights = *reinterpret_cast<const Pack<A, Count>*>(V);
#pragma unroll
            for (int k = 0; k < Count; ++k) {
              sums[k] += weights.values[k] * static_cast<A>(inputs.values[k]);
            }
          }
        }
      }
    }
  }
  const auto gradients = *reinterpret_cast<const Pack<T, Count>*>(
      g + output * layer.g_strides.channel + place.at[0] * layer.g_strides.space[0] +
      place.at[1] * layer.g_strides.space[1] + place.at[2] * layer.g_strides.space[2]);
  A sum = 0;
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    sum += static_cast<A>(gradients.values[k]) * sums[k];
  }
  return sum;
}

// A part of the sheet of an example: channels along the inner dimension, Count at a time, or the
// pixels of a channel.
template <int Count, class T, class A>
__global__ void __launch_bounds__(kSheetThreads, 3) correlate_narrow(
    const __grid_constant__ NarrowLayer<T, A> layer,
    int32_t outer,
    int32_t inner,
    bool by_pixel,
    SheetThreads threads,
    SheetParts parts,
    A* __restrict__ partial) {  // [n, parts]
  const int64_t example = blockIdx.x / parts.count;
  const Range range = parts.range(blockIdx.x % parts.count, outer);
  const T* const z = layer.z + example * layer.z_strides.example;
  const T* const g = layer.g + example * layer.g_strides.example;
  const auto thread = static_cast<int>(threadIdx.x);
  A sum = 0;
  const auto end = static_cast<int32_t>(range.end);
  for (int32_t y = static_cast<int32_t>(range.begin) + thread / threads.across; y < end;
       y += threads.down) {
    for (int32_t x = thread % threads.across * Count; x < inner; x += threads.across * Count) {
      sum += correlate_pixel<Count>(layer, z, g, by_pixel ? y : x, by_pixel ? x : y);
    }
  }
  sum = block_sum<kSheetThreads>(sum);
  if (thread == 0) {
    partial[blockIdx.x] = sum;
  }
}

// Whether Count channels of every pixel can be read at once.
bool fits_channel_vectors(const Tensor& tensor, const ImageStrides& strides, int64_t count) {
  const auto address = reinterpret_cast<uint64_t>(tensor.data_ptr());
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  for (const int64_t stride : strides.space) {
    if (!fits_vectors(
            address, bytes, {strides.example, stride, strides.channel}, tensor.size(1), count)) {
      return false;
    }
  }
  return true;
}

}  // namespace

void correlate_narrow_groups(
    const Launch& launch,
    const Convolution& convolution,
    const Tensor& z,
    const Tensor& g,
    const Tensor& direction,
    const OptionalTensor& direction_bias,
    const Tensor& u) {
  const ImageStrides z_strides = strides_of(z);
  const ImageStrides g_strides = strides_of(g);
  const int64_t channels = g.size(1);
  const int64_t pixels = convolution.pixels();
  const bool by_pixel = pixels > 1 && g_strides.space[2] < g_strides.channel;
  // Neighbouring threads read neighbouring numbers of V, or the same.
  const int64_t terms = convolution.inputs * convolution.taps();
  Tensor V =
      torch::stable::to(torch::stable::reshape(direction, {channels, terms}), u.scalar_type());
  V = torch::stable::contiguous(by_pixel ? V : torch::stable::transpose(V, 0, 1));
  const int64_t V_output = by_pixel ? terms : 1;
  const int64_t V_term = by_pixel ? 1 : channels;
  const int64_t outer = by_pixel ? channels : pixels;
  const int64_t inner = by_pixel ? pixels : channels;

  dispatch_device_type(z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulation_t<T>;
    const NarrowLayer<T, A> layer{
        ConvolutionIndex::of(convolution),
        data<T>(z),
        data<T>(g),
        data<A>(V),
        z_strides,
        g_strides,
        V_output,
        V_term,
        direction_bias ? either(*direction_bias, z.scalar_type()) : Either{},
        direction_bias.has_value(),
        static_cast<int32_t>(convolution.inputs),
        Divisor(convolution.outputs),
        Divisor(convolution.out[2]),
        Divisor(convolution.out[1])};
    const bool in_vectors =
        !by_pixel && convolution.inputs == 1 && convolution.outputs == 1 &&
        fits_channel_vectors(z, z_strides, kWidest<T>) &&
        fits_channel_vectors(g, g_strides, kWidest<T>) &&
        reinterpret_cast<uint64_t>(V.data_ptr()) % sizeof(Pack<A, kWidest<T>>) == 0;
    const SheetThreads threads = sheet_threads(in_vectors ? inner / kWidest<T> : inner);
    const SheetParts parts =
        parts_of_sheet(convolution.examples, outer, threads, launch.processors());
    sum_rows(
        launch, 1, convolution.examples * parts.count, parts.count, u, [&](const Tensor& partial) {
          launch.run(
              in_vectors ? &correlate_narrow<kWidest<T>, T, A> : &correlate_narrow<1, T, A>,
              convolution.examples * parts.count,
              kSheetThreads,
              0,
              layer,
              static_cast<int32_t>(outer),
              static_cast<int32_t>(inner),
              by_pixel,
              threads,
              parts,
              data<A>(partial));
        });
  });
}

}  // namespace l2rw::cuda
