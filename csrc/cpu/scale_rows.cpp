#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "layout.h"
#include "operator_checks.h"
#include "cpu/grain.h"
#include "cpu/isa/row_kernels.h"

namespace l2rw {
namespace {

constexpr const char* kOperation = "scale_rows";

Tensor scale_rows(const Tensor& g, const Tensor& weights, const Tensor& active) {
  check_scale_rows(g, weights, active);
  const int64_t n = g.size(0);
  const int64_t k = active.size(0);
  const auto* const rows = data<int64_t>(active);
  const int64_t step = active.stride(0);
  for (int64_t a = 0; a < k; ++a) {
    const int64_t row = rows[a * step];
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
  const int64_t outer_dim = by_channel ? 2 : 1;
  const int64_t inner_dim = by_channel ? 1 : 2;
  const int64_t outer = g.size(outer_dim);
  const int64_t inner = g.size(inner_dim);
  Tensor scaled = torch::stable::new_empty(g, {k, outer, inner});
  if (scaled.numel() > 0) {
    const Tensor wide = *in_accumulation_dtype(weights);
    dispatch_floating(g.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      using A = accumulation_t<T>;
      torch::stable::parallel_for(0, k * outer, grain_of(inner), [&](int64_t begin, int64_t end) {
        for (int64_t run = begin; run < end; ++run) {
          const int64_t row = rows[run / outer * step];
          const A weight = data<A>(wide)[row * wide.stride(0)];
          const T* from = data<T>(g) + row * g.stride(0) + run % outer * g.stride(outer_dim);
          T* to = data<T>(scaled) + run * inner;
          L2RW_ISA_CALL(RowKernels<T>::scale, from, g.stride(inner_dim), weight, to, inner);
        }
      });
    });
  }
  return by_channel ? torch::stable::transpose(scaled, 1, 2) : scaled;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) { m.impl("scale_rows", TORCH_BOX(&scale_rows)); }

}  // namespace l2rw
