#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "operator_checks.h"
#include "cpu/grain.h"
#include "cpu/isa/row_kernels.h"

namespace l2rw {
namespace {

constexpr const char* kOperation = "embedding_correlation";

template <class T, class V, class I>
void correlate(const Tensor& index, const Tensor& g, const Tensor& direction, const Tensor& u) {
  using A = accumulation_t<T>;
  const int64_t positions = g.size(1);
  const int64_t width = g.size(2);
  const int64_t grain = grain_of(positions * width);
  torch::stable::parallel_for(0, g.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A sum = 0;
      for (int64_t t = 0; t < positions; ++t) {
        const int64_t row = data<I>(index)[i * index.stride(0) + t * index.stride(1)];
        sum += L2RW_ISA_CALL(
            RowKernels<T>::dot,
            data<T>(g) + i * g.stride(0) + t * g.stride(1),
            g.stride(2),
            data<V>(direction) + row * direction.stride(0),
            direction.stride(1),
            width);
      }
      data<A>(u)[i] = sum;
    }
  });
}

template <class I>
void check_range(const Tensor& index, int64_t rows) {
  for (int64_t i = 0; i < index.size(0); ++i) {
    for (int64_t t = 0; t < index.size(1); ++t) {
      const int64_t row = data<I>(index)[i * index.stride(0) + t * index.stride(1)];
      check(
          row >= 0 && row < rows,
          kOperation,
          "index[",
          i,
          ", ",
          t,
          "] is ",
          row,
          ", and direction has ",
          rows,
          " rows");
    }
  }
}

Tensor embedding_correlation(const Tensor& index, const Tensor& g, const Tensor& direction) {
  check_embedding_correlation(index, g, direction);
  const ScalarType index_dtype = index.scalar_type();
  const auto with_index = [&](const auto& body) {
    return index_dtype == ScalarType::Long ? body(int64_t{}) : body(int32_t{});
  };
  with_index([&](auto zero) { check_range<decltype(zero)>(index, direction.size(0)); });

  const ScalarType dtype = g.scalar_type();
  Tensor u = torch::stable::new_empty(g, {g.size(0)}, accumulation_dtype(dtype));
  dispatch_floating(dtype, [&](auto element) {
    using T = decltype(element);
    with_index([&](auto zero) {
      using I = decltype(zero);
      if (direction.scalar_type() == dtype) {
        correlate<T, T, I>(index, g, direction, u);
      } else {
        correlate<T, accumulation_t<T>, I>(index, g, direction, u);
      }
    });
  });
  return u;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) {
  m.impl("embedding_correlation", TORCH_BOX(&embedding_correlation));
}

}  // namespace l2rw
