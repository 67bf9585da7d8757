#pragma once

// The inner loops of the operators that read each number once: raw pointers and strides (counted in
// elements), no tensors. T is an element type, A its accumulation type.

#include <cstdint>

#include "checks.h"
#include "cpu/isa.h"

namespace l2rw {

// One example of an affine layer. An absent mean or rstd points at one 0 or 1 with strides of zero.
template <class T>
struct AffineExample {
  using A = accumulation_t<T>;
  const T* x;  // [T, d]
  int64_t x_position, x_channel;
  const T* g;  // [T, d]
  int64_t g_position, g_channel;
  const A* mean;  // [T, d]
  int64_t mean_position, mean_channel;
  const A* rstd;  // [T, d]
  int64_t rstd_position, rstd_channel;
  int64_t positions, channels;
};

// What the backward of a group norm reads and writes: one group, or one example with all its
// groups. x, g and to have the same layout.
template <class T>
struct GroupNormBlock {
  using A = accumulation_t<T>;
  const T* x;
  const T* g;
  T* to;                                // gradient of x
  const A* mean;                        // [groups]
  const A* rstd;                        // [groups]
  const A* weight;                      // [groups * channels], or null: all ones
  A* gradient;                          // [groups * channels], of the scale
  A* gradient_bias;                     // [groups * channels], of the shift
  int64_t groups, channels, positions;  // channels of one group
};

// What the tangent of a batch norm reads and writes: part of one channel, or rows of all of them.
// x, dx and to have the same layout. dx is null where x has no tangent.
template <class T>
struct BatchNormBlock {
  using A = accumulation_t<T>;
  const T* x;
  const T* dx;
  T* to;
  const A* mean;                // [channels]
  int64_t positions, channels;  // [positions, channels], or [positions] of one channel
};

}  // namespace l2rw

L2RW_FOR_EACH_ISA(template <class T> struct RowKernels {
  using A = accumulation_t<T>;

  // gradient[c] = sum_t g_tc (x_tc - mean_tc) rstd_tc; gradient_bias[c] = sum_t g_tc.
  static void affine_gradient(
      const AffineExample<T>& example,
      A* gradient,        // [d], contiguous
      A* gradient_bias);  // [d], contiguous

  // Positions side by side: x, g, to are [channels, positions] of one group.
  static void group_norm_by_channel(const GroupNormBlock<T>& block);

  // Channels side by side: x, g, to are [positions, groups * channels] of one example.
  static void group_norm_by_position(
      const GroupNormBlock<T>& block,
      A* buffer);  // [4, groups * channels]

  // sum = sum_t dx_t; product = sum_t dx_t (x_t - mean), of one channel.
  static void batch_norm_sums_by_channel(const BatchNormBlock<T>& block, A* sum, A* product);

  // The same of all channels, which lie side by side.
  static void batch_norm_sums_by_position(
      const BatchNormBlock<T>& block,
      A* sum,       // [channels]
      A* product);  // [channels]

  // to = scale dx + slope (x - mean) + offset, of one channel.
  static void batch_norm_tangent_by_channel(
      const BatchNormBlock<T>& block, const A* scale, const A* slope, const A* offset);

  // The same of all channels, which lie side by side.
  static void batch_norm_tangent_by_position(
      const BatchNormBlock<T>& block,
      const A* scale,    // [channels]
      const A* slope,    // [channels]
      const A* offset);  // [channels]

  // sum_c a_c b_c. V is T or A.
  template <class V>
  static A dot(const T* a, int64_t a_stride, const V* b, int64_t b_stride, int64_t count);

  // to_c = weight from_c, `to` contiguous.
  static void scale(const T* from, int64_t stride, A weight, T* to, int64_t count);

  // to_c = sum_r weights_r from_rc over `rows` rows of which the starts are given, `to` contiguous.
  static void combine(
      const T* const* from, int64_t stride, const A* weights, int64_t rows, A* to, int64_t count);
};)
