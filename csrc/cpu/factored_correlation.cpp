#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "operator_checks.h"
#include "cpu/row_products.h"

namespace l2rw {
namespace {

// Adds the scores of a layer.
template <class T>
void add_scores(
    const Rows& z, const Rows& g, const Rows& z_clean, const Rows& g_clean, bool bias, T* scores) {
  const Kernels<T>& kernel = kernels<T>();
  const Panels<T> inputs(z_clean);
  const Panels<T> gradients(g_clean);
  Buffer<T> per_row(z.count());
  const double work = 1.0 * z_clean.count() * (z.width + g.width);
  for_row_blocks(z.count(), work, [&](int64_t begin, int64_t end, int64_t size) {
    RowBlock<T> z_rows(z);
    RowBlock<T> g_rows(g);
    Buffer<T> input_products(size * inputs.widest());
    Buffer<T> gradient_products(size * inputs.widest());
    for (int64_t first = begin; first < end; first += size) {
      const int64_t count = std::min(size, end - first);
      z_rows.take(first, count);
      g_rows.take(first, count);
      for (const auto& panel : inputs.panels()) {
        // The bias is one more input that is always 1. Equation (12): (z . z' + 1) (g . g').
        std::fill_n(input_products.data(), count * panel.width, T(bias ? 1 : 0));
        std::fill_n(gradient_products.data(), count * panel.width, T(0));
        inputs.multiply(z_rows.data(), z_rows.stride(), count, panel, input_products.data());
        gradients.multiply(g_rows.data(), g_rows.stride(), count, panel, gradient_products.data());
        for (int64_t r = 0; r < count; ++r) {
          per_row.data()[first + r] += kernel.dot(
              input_products.data() + r * panel.width,
              gradient_products.data() + r * panel.width,
              panel.columns);
        }
      }
    }
  });
  for (int64_t i = 0; i < z.examples; ++i) {
    scores[i] += kernel.sum(per_row.data() + i * z.positions, z.positions);
  }
}

// Both operators, whose arguments have been checked.
Tensor correlate(
    const Tensors& z,
    const Tensors& g,
    const Tensors& z_clean,
    const Tensors& g_clean,
    const std::vector<bool>& bias) {
  const ScalarType accumulation = accumulation_dtype(z[0].scalar_type());
  const Tensor scores = torch::stable::new_zeros(z[0], {z[0].size(0)}, accumulation);
  dispatch_accumulation(accumulation, [&](auto zero) {
    using T = decltype(zero);
    for (size_t l = 0; l < z.size(); ++l) {
      add_scores<T>(
          rows_of(z[l]),
          rows_of(g[l]),
          rows_of(z_clean[l]),
          rows_of(g_clean[l]),
          bias[l],
          data<T>(scores));
    }
  });
  return scores;
}

Tensor factored_correlation(
    const Tensor& z, const Tensor& g, const Tensor& z_clean, const Tensor& g_clean, bool bias) {
  check_factored_layer("factored_correlation", "", z, g, z_clean, g_clean);
  return correlate({z}, {g}, {z_clean}, {g_clean}, {bias});
}

Tensor factored_correlations(
    const Tensors& z,
    const Tensors& g,
    const Tensors& z_clean,
    const Tensors& g_clean,
    const std::vector<bool>& bias) {
  check_factored_correlations(z, g, z_clean, g_clean, bias);
  return correlate(z, g, z_clean, g_clean, bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) {
  m.impl("factored_correlation", TORCH_BOX(&factored_correlation));
  m.impl("factored_correlations", TORCH_BOX(&factored_correlations));
}

}  // namespace l2rw
