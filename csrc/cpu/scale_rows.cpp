#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "layout.h"
#include "operator_checks.h"
#include "cpu/grain.h"
#include "cpu/isa/row_kernels.h"

namespace l2rw {
namespace {

constexpr const char* kOperation = "scale_rows";

// [k, a, b] from g [n, a, b] with the given strides of a and b, b running fastest.
template <class T>
void scale_examples(
    const Tensor& g,
    const Tensor& weights,
    const Tensor& active,
    const Tensor& scaled,
    int64_t outer,
    int64_t outer_stride,
    int64_t inner,
    int64_t inner_stride) {
  using A = accumulation_t<T>;
  const int64_t* const rows = data<int64_t>(active);
  const int64_t row_step = active.stride(0);
  const int64_t runs = active.size(0) * outer;
  torch::stable::parallel_for(0, runs, grain_of(inner), [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t row = rows[run / outer * row_step];
      const A weight = data<A>(weights)[row * weights.stride(0)];
      const T* from = data<T>(g) + row * g.stride(0) + run % outer * outer_stride;
      T* to = data<T>(scaled) + run * inner;
      L2RW_ISA_CALL(RowKernels<T>::scale, from, inner_stride, weight, to, inner);
    }
  });
}

Tensor scale_rows(const Tensor& g, const Tensor& weights, const Tensor& active) {
  check_scale_rows(g, weights, active);
  const int64_t n = g.size(0);
  const int64_t positions = g.size(1);
  const int64_t channels = g.size(2);
  const int64_t k = active.size(0);
  for (int64_t a = 0; a < k; ++a) {
    const int64_t row = data<int64_t>(active)[a * active.stride(0)];
    check(
        row >= 0 && row < n,
        kOperation,
        "active[",
        a,
        "] is ",
        row,
        ", and g has ",
        n,
        " examples");
  }

  // The dimension that lies side by side in g does so in the result: no transposition on the way.
  const bool by_channel = g.stride(1) == 1 && g.stride(2) != 1;
  const Sizes shape = by_channel ? Sizes{k, channels, positions} : Sizes{k, positions, channels};
  Tensor scaled = torch::stable::new_empty(g, shape);
  if (scaled.numel() > 0) {
    const Tensor wide = *in_accumulation_dtype(weights);
    dispatch_floating(g.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      if (by_channel) {
        scale_examples<T>(g, wide, active, scaled, channels, g.stride(2), positions, g.stride(1));
      } else {
        scale_examples<T>(g, wide, active, scaled, positions, g.stride(1), channels, g.stride(2));
      }
    });
  }
  return by_channel ? torch::stable::transpose(scaled, 1, 2) : scaled;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) { m.impl("scale_rows", TORCH_BOX(&scale_rows)); }

}  // namespace l2rw
