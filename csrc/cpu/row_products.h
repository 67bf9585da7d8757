#pragma once

// Products of the rows of a layer's inputs or gradients with a packed matrix, a block of rows and a
// panel of columns at a time. docs/kernels.md says how they are blocked.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/convolution.h"

namespace l2rw {

// A tensor (examples, positions, width) as rows of numbers; strides in elements.
struct Rows {
  const void* data;
  ScalarType dtype;
  int64_t examples;
  int64_t positions;
  int64_t width;
  int64_t example;
  int64_t position;
  int64_t feature;

  int64_t count() const { return examples * positions; }
};

Rows rows_of(const Tensor& tensor);  // [n, T, d]

// The rows of a tensor as the columns of a product.
template <class T>
class Panels {
 public:
  struct Panel {
    int64_t first;    // column
    int64_t columns;  // without padding
    int64_t vectors;
    int64_t width;  // with padding
  };

  explicit Panels(const Rows& source);

  const std::vector<Panel>& panels() const { return panels_; }
  int64_t widest() const { return widest_; }

  // out[r, c] += a[r] . column c of the panel.
  void multiply(
      const T* a,  // [rows, depth]
      int64_t lda,
      int64_t rows,
      const Panel& panel,
      T* out) const;  // [rows, panel.width]

 private:
  const Kernels<T>& kernels_;
  int64_t depth_;
  int64_t widest_;
  std::vector<Panel> panels_;
  Buffer<T> packed_;
};

// Some rows as plain memory: the tensor's own where they lie evenly, else a copy.
template <class T>
class RowBlock {
 public:
  explicit RowBlock(const Rows& rows);
  void take(int64_t first, int64_t count);
  const T* data() const { return data_; }
  const T* row(int64_t r) const { return data_ + r * stride_; }
  int64_t stride() const { return stride_; }

 private:
  const Rows& rows_;
  bool in_place_;
  Buffer<T> copy_;
  const T* data_ = nullptr;
  int64_t stride_;
};

// Rows of a block: what their products with one panel leave in the first-level cache.
constexpr int64_t kBlockRows = 96;

// Calls body(begin, end, size), in parallel, for ranges of rows that are to be taken in blocks of
// `size`. `work`: multiply-adds of a row.
template <class Body>
void for_row_blocks(int64_t rows, double work, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = threads * ceil_div(rows, threads * kBlockRows);
  const int64_t size = std::max<int64_t>(ceil_div(rows, std::max<int64_t>(blocks, 1)), 1);
  const double per_block = std::max(work * static_cast<double>(size), 1.0);
  const int64_t grain = std::max<int64_t>(static_cast<int64_t>(1e5 / per_block), 1);
  torch::stable::parallel_for(0, ceil_div(rows, size), grain, [&](int64_t begin, int64_t end) {
    body(begin * size, std::min(end * size, rows), size);
  });
}

}  // namespace l2rw
