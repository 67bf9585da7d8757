#include "cpu/row_products.h"

#include "cpu/grain.h"

namespace l2rw {
namespace {

constexpr int64_t kPanelVectors = 3;
// Depth of a panel that is multiplied at a time, so that it stays in the second-level cache.
constexpr int64_t kDepth = 1024;

const char* address(const Rows& rows, int64_t i, int64_t t, int64_t c) {
  return static_cast<const char*>(rows.data) +
         bytes_of(rows.dtype) * (i * rows.example + t * rows.position + c * rows.feature);
}

}  // namespace

Rows rows_of(const Tensor& tensor) {
  Rows rows{
      tensor.data_ptr(),
      tensor.scalar_type(),
      tensor.size(0),
      tensor.size(1),
      tensor.size(2),
      tensor.stride(0),
      tensor.stride(1),
      tensor.stride(2)};
  // A dimension of size one may have any stride: give it the one that lets rows follow each other.
  if (rows.positions == 1) {
    rows.position = rows.example;
  }
  if (rows.examples == 1) {
    rows.example = rows.positions * rows.position;
  }
  return rows;
}

template <class T>
Panels<T>::Panels(const Rows& source)
    : kernels_(kernels<T>()),
      depth_(source.width),
      widest_(0),
      packed_(ceil_div(source.count(), kernels_.lanes) * kernels_.lanes * source.width) {
  const int64_t lanes = kernels_.lanes;
  split_evenly(ceil_div(source.count(), lanes), kPanelVectors, [&](int64_t first, int64_t vectors) {
    const int64_t columns = std::min(vectors * lanes, source.count() - first * lanes);
    panels_.push_back({first * lanes, columns, vectors, vectors * lanes});
    widest_ = std::max(widest_, vectors * lanes);
  });
  const auto count = static_cast<int64_t>(panels_.size());
  const int64_t grain = grain_of(widest_ * depth_);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const Panel& panel = panels_[p];
      // Columns of one example lie evenly.
      for (int64_t c = 0, size = 0; c < panel.columns; c += size) {
        const int64_t i = (panel.first + c) / source.positions;
        const int64_t t = (panel.first + c) % source.positions;
        const bool even = source.example == source.positions * source.position;
        size = even ? panel.columns : std::min(panel.columns - c, source.positions - t);
        kernels_.transpose(
            packed_.data() + panel.first * depth_ + c,
            panel.width,
            address(source, i, t, 0),
            source.dtype,
            source.position,
            source.feature,
            size,
            depth_,
            T(1));
      }
    }
  });
}

template <class T>
void Panels<T>::multiply(const T* a, int64_t lda, int64_t rows, const Panel& panel, T* out) const {
  const T* b = packed_.data() + panel.first * depth_;
  const int64_t most = std::min<int64_t>(kMaxRowTile, kernels_.max_rows[panel.vectors]);
  for (int64_t k = 0; k < depth_; k += kDepth) {
    const int64_t depth = std::min(kDepth, depth_ - k);
    split_evenly(rows, most, [&](int64_t first, int64_t count) {
      kernels_.row_tile[panel.vectors][count](
          a + first * lda + k,
          lda,
          b + k * panel.width,
          depth,
          out + first * panel.width,
          panel.width);
    });
  }
}

template <class T>
RowBlock<T>::RowBlock(const Rows& rows)
    : rows_(rows),
      in_place_(
          rows.dtype == kDtype<T> && rows.feature == 1 &&
          rows.example == rows.positions * rows.position),
      copy_(in_place_ ? 0 : kBlockRows * rows.width),
      stride_(in_place_ ? rows.position : rows.width) {}

template <class T>
void RowBlock<T>::take(int64_t first, int64_t count) {
  if (in_place_) {
    data_ = static_cast<const T*>(rows_.data) + first * stride_;
    return;
  }
  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = first + r;
    kernels<T>().transpose(
        copy_.data() + r * stride_,
        0,
        address(rows_, row / rows_.positions, row % rows_.positions, 0),
        rows_.dtype,
        rows_.feature,
        0,
        rows_.width,
        1,
        T(1));
  }
  data_ = copy_.data();
}

template class Panels<float>;
template class Panels<double>;
template class RowBlock<float>;
template class RowBlock<double>;

}  // namespace l2rw
