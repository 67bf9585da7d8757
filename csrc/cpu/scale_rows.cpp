#include "correlation.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "checks.h"

namespace l2rw {
namespace {

constexpr const char* kOperation = "scale_rows";

}  // namespace

Tensor scale_rows(const Tensor& g, const Tensor& weights, const Tensor& active) {
  check_dim(kOperation, {"g", g}, 3);
  check_dim(kOperation, {"weights", weights}, 1);
  check_dim(kOperation, {"active", active}, 1);
  check_floating(kOperation, {"g", g});
  check_same_or_accumulation(kOperation, {"g", g}, {"weights", weights});
  check_device(kOperation, {"g", g}, {"active", active});
  check_size(kOperation, {"weights", weights}, 0, g.size(0), "examples of g");
  check(
      active.scalar_type() == ScalarType::Long,
      kOperation,
      "active must be int64, got ",
      dtype_name(active.scalar_type()));
  const int64_t n = g.size(0);
  const int64_t positions = g.size(1);
  const int64_t width = g.size(2);
  const int64_t k = active.size(0);
  const int64_t* const rows = data<int64_t>(active);
  const int64_t row_stride = active.stride(0);
  for (int64_t a = 0; a < k; ++a) {
    const int64_t row = rows[a * row_stride];
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

  Tensor scaled = torch::stable::new_empty(g, {k, positions, width});
  if (scaled.numel() == 0) {
    return scaled;
  }
  dispatch_floating(g.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulation_t<T>;
    const T* const source = data<T>(g);
    T* const target = data<T>(scaled);
    const bool narrow = weights.scalar_type() == g.scalar_type();
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width));
    torch::stable::parallel_for(0, k * positions, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t row = rows[r / positions * row_stride];
        const A w = narrow ? static_cast<A>(data<T>(weights)[row * weights.stride(0)])
                           : data<A>(weights)[row * weights.stride(0)];
        const T* from = source + row * g.stride(0) + r % positions * g.stride(1);
        T* to = target + r * width;
        const int64_t stride = g.stride(2);
        if (stride == 1) {
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) {
            to[c] = static_cast<T>(w * static_cast<A>(from[c]));
          }
        } else {
          for (int64_t c = 0; c < width; ++c) {
            to[c] = static_cast<T>(w * static_cast<A>(from[c * stride]));
          }
        }
      }
    });
  });
  return scaled;
}

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) { m.impl("scale_rows", TORCH_BOX(&scale_rows)); }

}  // namespace l2rw
