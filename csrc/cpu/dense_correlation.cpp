#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "layout.h"
#include "operator_checks.h"
#include "cpu/row_products.h"

namespace l2rw {
namespace {

// u_i = sum_t sum_c right_itc (offset_c + sum_k left_itk matrix_ck).
template <class T>
void correlate(
    const Rows& left,
    const Rows& right,
    const Rows& matrix,  // [1, width of right, width of left]
    const T* offset,     // [width of right] or null
    T* per_row) {        // [rows]
  const Kernels<T>& kernel = kernels<T>();
  const Panels<T> columns(matrix);
  const double work = 1.0 * left.width * right.width;
  for_row_blocks(left.count(), work, [&](int64_t begin, int64_t end, int64_t size) {
    RowBlock<T> left_rows(left);
    RowBlock<T> right_rows(right);
    Buffer<T> products(size * columns.widest());
    for (int64_t first = begin; first < end; first += size) {
      const int64_t count = std::min(size, end - first);
      left_rows.take(first, count);
      right_rows.take(first, count);
      for (const auto& panel : columns.panels()) {
        std::fill_n(products.data(), count * panel.width, T(0));
        for (int64_t r = 0; offset != nullptr && r < count; ++r) {
          std::copy_n(offset + panel.first, panel.columns, products.data() + r * panel.width);
        }
        columns.multiply(left_rows.data(), left_rows.stride(), count, panel, products.data());
        for (int64_t r = 0; r < count; ++r) {
          per_row[first + r] += kernel.dot(
              products.data() + r * panel.width, right_rows.row(r) + panel.first, panel.columns);
        }
      }
    }
  });
}

// Multiply-adds of a row, with columns rounded up to vectors.
template <class T>
int64_t padded_work(int64_t depth, int64_t columns) {
  const int64_t lanes = kernels<T>().lanes;
  return ceil_div(columns, lanes) * lanes * (depth + 2);
}

template <class T>
void correlate(
    const Rows& z,
    const Rows& g,
    const Tensor& direction,
    const T* bias,  // [width of g] or null
    T* scores) {
  const Kernels<T>& kernel = kernels<T>();
  Rows matrix{
      direction.data_ptr(),
      direction.scalar_type(),
      1,
      direction.size(0),
      direction.size(1),
      direction.size(0) * direction.stride(0),
      direction.stride(0),
      direction.stride(1)};
  Buffer<T> per_row(z.count());
  if (padded_work<T>(z.width, g.width) <= padded_work<T>(g.width, z.width)) {
    correlate<T>(z, g, matrix, bias, per_row.data());
  } else {  // z . (V^T g), then g . V_b
    std::swap(matrix.positions, matrix.width);
    std::swap(matrix.position, matrix.feature);
    matrix.example = matrix.positions * matrix.position;
    correlate<T>(g, z, matrix, nullptr, per_row.data());
    if (bias != nullptr) {
      for_row_blocks(g.count(), g.width, [&](int64_t begin, int64_t end, int64_t size) {
        RowBlock<T> g_rows(g);
        for (int64_t first = begin; first < end; first += size) {
          const int64_t count = std::min(size, end - first);
          g_rows.take(first, count);
          for (int64_t r = 0; r < count; ++r) {
            per_row.data()[first + r] += kernel.dot(g_rows.row(r), bias, g.width);
          }
        }
      });
    }
  }
  for (int64_t i = 0; i < z.examples; ++i) {
    scores[i] = kernel.sum(per_row.data() + i * z.positions, z.positions);
  }
}

Tensor dense_correlation(
    const Tensor& z,
    const Tensor& g,
    const Tensor& direction,
    const OptionalTensor& direction_bias) {
  check_linear_layer("dense_correlation", z, g, direction, direction_bias);
  Tensor scores = torch::stable::new_empty(z, {z.size(0)}, accumulation_dtype(z.scalar_type()));
  const OptionalTensor bias = contiguous_in_accumulation_dtype(direction_bias);
  dispatch_accumulation(z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    correlate<T>(rows_of(z), rows_of(g), direction, data<T>(bias), data<T>(scores));
  });
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) {
  m.impl("dense_correlation", TORCH_BOX(&dense_correlation));
}

}  // namespace l2rw
