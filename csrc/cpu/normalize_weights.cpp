#include "correlation.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "checks.h"

namespace l2rw {
namespace {

constexpr const char* kOperation = "normalize_weights";

template <class T>
void normalize(const T* u, int64_t stride, T* w, int64_t n) {
  // Equation (8): w~ = max(u, 0). NaN and infinities count as zero.
  accumulation_t<T> sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto score = static_cast<accumulation_t<T>>(u[i * stride]);
    sum += std::isfinite(score) && score > 0 ? score : 0;
  }
  // Equation (9): w = w~ / (sum w~ + delta(sum w~)); all weights are zero where the sum is.
  // A sum that overflows is scaled down first.
  accumulation_t<T> scale = 1;
  if (!std::isfinite(sum)) {
    scale = static_cast<accumulation_t<T>>(1) / static_cast<accumulation_t<T>>(n);
    sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const auto score = static_cast<accumulation_t<T>>(u[i * stride]);
      sum += std::isfinite(score) && score > 0 ? score * scale : 0;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const auto score = static_cast<accumulation_t<T>>(u[i * stride]);
    w[i] = static_cast<T>(std::isfinite(score) && score > 0 ? score * scale / sum : 0);
  }
}

}  // namespace

Tensor normalize_weights(const Tensor& u) {
  check_dim(kOperation, {"u", u}, 1);
  check_floating(kOperation, {"u", u});
  Tensor w = torch::stable::new_empty(u, {u.size(0)});
  dispatch_floating(u.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    normalize<T>(data<T>(u), u.stride(0), data<T>(w), u.size(0));
  });
  return w;
}

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) {
  m.impl("normalize_weights", TORCH_BOX(&normalize_weights));
}

}  // namespace l2rw
