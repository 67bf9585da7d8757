#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "layout.h"
#include "cpu/grain.h"
#include "cpu/isa/row_kernels.h"

namespace l2rw {
namespace {

constexpr const char* kOperation = "batch_norm_tangent";

// What one partial sum is formed over, the same for any number of threads. Partial sums are added
// in float64.
constexpr int64_t kPositions = 4096;  // of one channel
constexpr int64_t kRows = 1024;       // of all channels

// What the tangent is made of, channel by channel: to = scale dx + slope (x - mean) + offset.
template <class A>
struct Coefficients {
  std::vector<A> scale, slope, offset;

  explicit Coefficients(int64_t channels)
      : scale(static_cast<size_t>(channels)), slope(scale), offset(scale) {}
};

template <class A>
struct Channels {
  const A* rstd;       // [channels]
  const A* weight;     // [channels], or null: ones
  const A* direction;  // [channels], or null: zeros
  const A* bias;       // [channels], or null: zeros
  int64_t count;       // of examples and positions

  // sum: of dx; product: of dx (x - mean).
  void finish(int64_t channel, double sum, double product, Coefficients<A>& to) const {
    const auto c = static_cast<size_t>(channel);
    const double factor = rstd[c];
    const double scale = weight == nullptr ? factor : factor * static_cast<double>(weight[c]);
    const double share = scale / static_cast<double>(std::max<int64_t>(1, count));
    const double along = direction == nullptr ? 0 : factor * static_cast<double>(direction[c]);
    const double constant = bias == nullptr ? 0 : static_cast<double>(bias[c]);
    to.scale[c] = static_cast<A>(scale);
    to.slope[c] = static_cast<A>(along - share * factor * factor * product);
    to.offset[c] = static_cast<A>(constant - share * sum);
  }
};

// x, dx, to: [n, channels, positions].
template <class T, class A = accumulation_t<T>>
void by_channel(
    const BatchNormBlock<T>& all, const Channels<A>& channels, int64_t n, int64_t positions) {
  Coefficients<A> coefficients(all.channels);
  const auto each_part = [&](int64_t c, auto&& body) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t begin = 0; begin < positions; begin += kPositions) {
        const int64_t at = (i * all.channels + c) * positions + begin;
        body(
            BatchNormBlock<T>{
                all.x + at,
                all.dx == nullptr ? nullptr : all.dx + at,
                all.to + at,
                all.mean + c,
                std::min(kPositions, positions - begin),
                1});
      }
    }
  };
  torch::stable::parallel_for(
      0, all.channels, grain_of(n * positions), [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c) {
          double sum = 0;
          double product = 0;
          if (all.dx != nullptr) {
            each_part(c, [&](const BatchNormBlock<T>& part) {
              A part_sum = 0;
              A part_product = 0;
              L2RW_ISA_CALL(
                  RowKernels<T>::batch_norm_sums_by_channel, part, &part_sum, &part_product);
              sum += part_sum;
              product += part_product;
            });
          }
          channels.finish(c, sum, product, coefficients);
          each_part(c, [&](const BatchNormBlock<T>& part) {
            L2RW_ISA_CALL(
                RowKernels<T>::batch_norm_tangent_by_channel,
                part,
                coefficients.scale.data() + c,
                coefficients.slope.data() + c,
                coefficients.offset.data() + c);
          });
        }
      });
}

// x, dx, to: [rows, channels].
template <class T, class A = accumulation_t<T>>
void by_position(const BatchNormBlock<T>& all, const Channels<A>& channels, int64_t rows) {
  Coefficients<A> coefficients(all.channels);
  const int64_t parts = (rows + kRows - 1) / kRows;
  const auto part = [&](int64_t k) {
    const int64_t at = k * kRows * all.channels;
    return BatchNormBlock<T>{
        all.x + at,
        all.dx == nullptr ? nullptr : all.dx + at,
        all.to + at,
        all.mean,
        std::min(kRows, rows - k * kRows),
        all.channels};
  };
  const int64_t grain = grain_of(kRows * all.channels);
  std::vector<A> sums(static_cast<size_t>(2 * parts * all.channels));
  if (all.dx != nullptr) {
    torch::stable::parallel_for(0, parts, grain, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        A* const sum = sums.data() + 2 * k * all.channels;
        L2RW_ISA_CALL(RowKernels<T>::batch_norm_sums_by_position, part(k), sum, sum + all.channels);
      }
    });
  }
  for (int64_t c = 0; c < all.channels; ++c) {
    double sum = 0;
    double product = 0;
    for (int64_t k = 0; k < parts; ++k) {
      sum += sums[static_cast<size_t>(2 * k * all.channels + c)];
      product += sums[static_cast<size_t>((2 * k + 1) * all.channels + c)];
    }
    channels.finish(c, sum, product, coefficients);
  }
  torch::stable::parallel_for(0, parts, grain, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      L2RW_ISA_CALL(
          RowKernels<T>::batch_norm_tangent_by_position,
          part(k),
          coefficients.scale.data(),
          coefficients.slope.data(),
          coefficients.offset.data());
    }
  });
}

Tensor batch_norm_tangent(
    const Tensor& x,
    const OptionalTensor& x_tangent,
    const Tensor& mean,
    const Tensor& rstd,
    const OptionalTensor& weight,
    const OptionalTensor& direction,
    const OptionalTensor& direction_bias) {
  check(x.dim() >= 2, kOperation, "x must have at least 2 dimensions, got shape ", shape_of(x));
  check_floating(kOperation, {"x", x});
  if (x_tangent.has_value()) {
    check_like(kOperation, {"x", x}, {"x_tangent", *x_tangent});
  }
  const auto check_channels = [&](const char* name, const OptionalTensor& tensor) {
    check_vector(kOperation, {"x", x}, name, tensor, x.size(1), "channels of x");
  };
  check_channels("mean", mean);
  check_channels("rstd", rstd);
  check_channels("weight", weight);
  check_channels("direction", direction);
  check_channels("direction_bias", direction_bias);

  const bool side_by_side = !x.is_contiguous() && channels_last(x);
  const Tensor input = side_by_side ? x : torch::stable::contiguous(x);
  const Tensor result = torch::stable::empty_like(input);
  OptionalTensor tangent;
  if (x_tangent.has_value()) {
    tangent = in_layout_of(input, side_by_side, *x_tangent);
  }
  const OptionalTensor shift = contiguous_in_accumulation_dtype(mean);
  const OptionalTensor factor = contiguous_in_accumulation_dtype(rstd);
  const OptionalTensor scale = contiguous_in_accumulation_dtype(weight);
  const OptionalTensor along = contiguous_in_accumulation_dtype(direction);
  const OptionalTensor constant = contiguous_in_accumulation_dtype(direction_bias);
  const int64_t n = x.size(0);
  const int64_t positions = positions_of(x);

  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulation_t<T>;
    const Channels<A> channels{
        data<A>(factor), data<A>(scale), data<A>(along), data<A>(constant), n * positions};
    const BatchNormBlock<T> all{
        data<T>(input),
        data<T>(tangent),
        data<T>(result),
        data<A>(shift),
        n * positions,
        x.size(1)};
    if (side_by_side || positions == 1) {
      by_position(all, channels, n * positions);
    } else {
      by_channel(all, channels, n, positions);
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) {
  m.impl("batch_norm_tangent", TORCH_BOX(&batch_norm_tangent));
}

}  // namespace l2rw
