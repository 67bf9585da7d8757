#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "operator_checks.h"
#include "cpu/row_kernels.h"

namespace l2rw {
namespace {

// Numbers a thread adds up at a time: the partial sums stay in the first-level cache.
constexpr int64_t kBlock = 2048;

// G_i as `outer` dimensions around a run of `length` elements `stride` apart, with as few
// dimensions as its memory allows.
struct Rows {
  Sizes outer_sizes;
  Sizes outer_strides;
  int64_t length = 1;
  int64_t stride = 1;
};

Rows collapse(const Tensor& gradients) {
  Rows rows;
  Sizes sizes;
  Sizes strides;
  for (int64_t d = 1; d < gradients.dim(); ++d) {
    const int64_t size = gradients.size(d);
    const int64_t stride = gradients.stride(d);
    if (size == 1) {
      continue;
    }
    if (!sizes.empty() && strides.back() == size * stride) {
      sizes.back() *= size;
      strides.back() = stride;
    } else {
      sizes.push_back(size);
      strides.push_back(stride);
    }
  }
  if (!sizes.empty()) {
    rows.length = sizes.back();
    rows.stride = strides.back();
    sizes.pop_back();
    strides.pop_back();
  }
  rows.outer_sizes = sizes;
  rows.outer_strides = strides;
  return rows;
}

template <class T>
void sum_rows(
    const Tensor& gradients,
    const std::vector<int64_t>& active,
    const std::vector<accumulation_t<T>>& weights,
    const Tensor& total) {
  using A = accumulation_t<T>;
  const Rows rows = collapse(gradients);
  const int64_t blocks_per_run = (rows.length + kBlock - 1) / kBlock;
  const int64_t blocks = total.numel() / rows.length * blocks_per_run;
  const int64_t example_stride = gradients.stride(0);
  const auto examples = static_cast<int64_t>(active.size());
  const int64_t block_work =
      std::max<int64_t>(1, std::min(rows.length, kBlock) * std::max<int64_t>(1, examples));
  torch::stable::parallel_for(
      0, blocks, std::max<int64_t>(1, 32768 / block_work), [&](int64_t begin, int64_t end) {
        std::vector<const T*> starts(active.size());
        for (int64_t block = begin; block < end; ++block) {
          int64_t run = block / blocks_per_run;
          const int64_t first = block % blocks_per_run * kBlock;
          A* const to = data<A>(total) + run * rows.length + first;
          int64_t offset = first * rows.stride;
          for (size_t d = rows.outer_sizes.size(); d-- > 0;) {
            offset += run % rows.outer_sizes[d] * rows.outer_strides[d];
            run /= rows.outer_sizes[d];
          }
          for (size_t r = 0; r < active.size(); ++r) {
            starts[r] = data<T>(gradients) + active[r] * example_stride + offset;
          }
          const int64_t count = std::min(kBlock, rows.length - first);
          L2RW_ISA_CALL(combine, starts.data(), rows.stride, weights.data(), examples, to, count);
        }
      });
}

Tensor weighted_sum(const Tensor& gradients, const Tensor& weights) {
  check_weighted_sum(gradients, weights);

  Sizes shape;
  for (int64_t d = 1; d < gradients.dim(); ++d) {
    shape.push_back(gradients.size(d));
  }
  const ScalarType dtype = gradients.scalar_type();
  Tensor total = torch::stable::new_empty(gradients, shape, accumulation_dtype(dtype));
  if (total.numel() == 0) {
    return total;
  }
  dispatch_floating(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulation_t<T>;
    // 0 * NaN is NaN: an example without weight is left out.
    std::vector<int64_t> active;
    std::vector<A> active_weights;
    for (int64_t i = 0; i < weights.size(0); ++i) {
      const int64_t at = i * weights.stride(0);
      const A weight = weights.scalar_type() == dtype ? static_cast<A>(data<T>(weights)[at])
                                                      : data<A>(weights)[at];
      if (weight != 0) {
        active.push_back(i);
        active_weights.push_back(weight);
      }
    }
    sum_rows<T>(gradients, active, active_weights, total);
  });
  return total;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) { m.impl("weighted_sum", TORCH_BOX(&weighted_sum)); }

}  // namespace l2rw
