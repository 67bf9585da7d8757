#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "checks.h"

namespace l2rw {
namespace {

constexpr const char* kOperation = "normalize_weights";

// Equation (8): w~ = max(u, 0), where NaN and infinities count as zero.
template <class T>
double rectified(T u) {
  const auto score = static_cast<double>(u);
  return std::isfinite(score) && score > 0 ? score : 0;
}

// sum of w~_i scale. What each addition loses is kept (Kahan), so that weights are as exact for
// many examples as for few; it is not finite where the sum overflows.
template <class T>
double rectified_sum(const T* u, int64_t stride, int64_t n, double scale) {
  double sum = 0;
  double excess = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double term = rectified(u[i * stride]) * scale - excess;
    const double next = sum + term;
    excess = (next - sum) - term;
    sum = next;
  }
  return sum;
}

template <class T>
void normalize(const T* u, int64_t stride, T* w, int64_t n) {
  double scale = 1;
  double sum = rectified_sum(u, stride, n, scale);
  if (!std::isfinite(sum)) {
    scale = 1 / static_cast<double>(n);
    sum = rectified_sum(u, stride, n, scale);
  }
  // Equation (9): w = w~ / (sum w~ + delta(sum w~)); all weights are zero where the sum is.
  for (int64_t i = 0; i < n; ++i) {
    const double score = rectified(u[i * stride]);
    w[i] = static_cast<T>(static_cast<accumulation_t<T>>(score > 0 ? score * scale / sum : 0));
  }
}

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) {
  m.impl("normalize_weights", TORCH_BOX(&normalize_weights));
}

}  // namespace l2rw
