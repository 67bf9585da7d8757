#include "cuda/conv/narrow.cuh"

#include <algorithm>
#include <cstdint>

#include "cuda/conv/geometry.h"
#include "cuda/reduce/block.cuh"
#include "cuda/reduce/partial_sums.cuh"
#include "cuda/reduce/segments.h"
#include "cuda/util/integers.h"
#include "cuda/util/strides.h"
#include "cuda/util/types.cuh"
#include "cuda/util/vectors.h"

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
struct NarrowProblem {
  ConvolutionGeometry geometry;
  const T* z;          // [n, C, *s]
  const T* g;          // [n, O, *p]
  const A* direction;  // [O, inputs, *k]
  ImageStrides z_strides;
  ImageStrides g_strides;
  int64_t V_output;  // elements from output channel to output channel
  int64_t V_term;    // from element to element of an output channel
  EitherDtype bias;  // [O]
  bool has_bias;
  int32_t inputs;   // channels of a group
  Divisor outputs;  // channels of a group
};

// g . (V * z + V_b) at one pixel, for Count channels from `output` on. More than one are those of a
// depthwise convolution whose channels are contiguous.
template <int Count, class T, class A>
__device__ __forceinline__ A correlate_pixel(
    const NarrowProblem<T, A>& problem, const T* z, const T* g, int32_t output, int32_t pixel) {
  const ConvolutionGeometry& geometry = problem.geometry;
  const PixelCoord coord = geometry.coord(pixel);
  A sums[Count];
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    sums[k] = problem.has_bias ? problem.bias.template load<T, A>(output + k) : A(0);
  }
  const int32_t first_input = problem.outputs.divide(output) * problem.inputs;
  const A* V = problem.direction + output * problem.V_output;
  for (int32_t c = first_input; c < first_input + problem.inputs; ++c) {
    for (int k0 = 0; k0 < geometry.kernel[0]; ++k0) {
      const int at0 =
          coord.at[0] * geometry.stride[0] - geometry.padding[0] + k0 * geometry.dilation[0];
      for (int k1 = 0; k1 < geometry.kernel[1]; ++k1) {
        const int at1 =
            coord.at[1] * geometry.stride[1] - geometry.padding[1] + k1 * geometry.dilation[1];
        const bool inside = 0 <= at0 && at0 < geometry.in[0] && 0 <= at1 && at1 < geometry.in[1];
        const T* const row_start = z + c * problem.z_strides.channel +
                                   at0 * problem.z_strides.space[0] +
                                   at1 * problem.z_strides.space[1];
        for (int k2 = 0; k2 < geometry.kernel[2]; ++k2, V += problem.V_term) {
          const int at2 =
              coord.at[2] * geometry.stride[2] - geometry.padding[2] + k2 * geometry.dilation[2];
          if (inside && 0 <= at2 && at2 < geometry.in[2]) {
            const auto inputs = *reinterpret_cast<const Vector<T, Count>*>(
                row_start + at2 * problem.z_strides.space[2]);
            const auto weights = *reinterpret_cast<const Vector<A, Count>*>(V);
#pragma unroll
            for (int k = 0; k < Count; ++k) {
              sums[k] += weights.values[k] * static_cast<A>(inputs.values[k]);
            }
          }
        }
      }
    }
  }
  const auto gradients = *reinterpret_cast<const Vector<T, Count>*>(
      g + output * problem.g_strides.channel + coord.at[0] * problem.g_strides.space[0] +
      coord.at[1] * problem.g_strides.space[1] + coord.at[2] * problem.g_strides.space[2]);
  A sum = 0;
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    sum += static_cast<A>(gradients.values[k]) * sums[k];
  }
  return sum;
}

// A segment of an example. The inner dimension are the channels, Count at a time, or the pixels of
// a channel.
template <int Count, class T, class A>
__global__ void __launch_bounds__(kBlockThreads, 3) narrow_kernel(
    const __grid_constant__ NarrowProblem<T, A> problem,
    int32_t outer,
    int32_t inner,
    bool by_pixel,
    BlockShape shape,
    Segments segments,
    A* __restrict__ partial) {  // [n, segments]
  const int64_t example = blockIdx.x / segments.count;
  const Range range = segments.range(blockIdx.x % segments.count, outer);
  const T* const z = problem.z + example * problem.z_strides.example;
  const T* const g = problem.g + example * problem.g_strides.example;
  const auto thread = static_cast<int>(threadIdx.x);
  A sum = 0;
  const auto end = static_cast<int32_t>(range.end);
  for (int32_t y = static_cast<int32_t>(range.begin) + thread / shape.x; y < end; y += shape.y) {
    for (int32_t x = thread % shape.x * Count; x < inner; x += shape.x * Count) {
      sum += correlate_pixel<Count>(problem, z, g, by_pixel ? y : x, by_pixel ? x : y);
    }
  }
  sum = block_sum<kBlockThreads>(sum);
  if (thread == 0) {
    partial[blockIdx.x] = sum;
  }
}

// Whether the channels of every pixel can be read in the widest vectors.
template <class T>
bool fits_channel_vectors(const Tensor& tensor, const ImageStrides& strides) {
  return std::ranges::all_of(strides.space, [&](int64_t stride) {
    const Strides pixels{strides.example, stride, strides.channel};
    return fits_vectors(data<T>(tensor), pixels, tensor.size(1), kVectorElements<T>);
  });
}

}  // namespace

void correlate_narrow(
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
  // Neighbouring threads read neighbouring elements of V, or the same one.
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
    const NarrowProblem<T, A> problem{
        ConvolutionGeometry::of(convolution),
        data<T>(z),
        data<T>(g),
        data<A>(V),
        z_strides,
        g_strides,
        V_output,
        V_term,
        direction_bias ? either_dtype(*direction_bias, z.scalar_type()) : EitherDtype{},
        direction_bias.has_value(),
        static_cast<int32_t>(convolution.inputs),
        Divisor(convolution.outputs)};
    const bool vectors =
        !by_pixel && convolution.inputs == 1 && convolution.outputs == 1 &&
        fits_channel_vectors<T>(z, z_strides) && fits_channel_vectors<T>(g, g_strides) &&
        reinterpret_cast<uint64_t>(V.data_ptr()) % sizeof(Vector<A, kVectorElements<T>>) == 0;
    const BlockShape shape = block_shape(vectors ? inner / kVectorElements<T> : inner);
    const Segments segments = segments_of(convolution.examples, outer, shape, launch.processors());
    const int64_t blocks = convolution.examples * segments.count;
    sum_parts_of_rows(launch, 1, blocks, segments.count, u, [&](const Tensor& partial) {
      launch.run(
          vectors ? &narrow_kernel<kVectorElements<T>, T, A> : &narrow_kernel<1, T, A>,
          blocks,
          kBlockThreads,
          0,
          problem,
          static_cast<int32_t>(outer),
          static_cast<int32_t>(inner),
          by_pixel,
          shape,
          segments,
          data<A>(partial));
    });
  });
}

}  // namespace l2rw::cuda
