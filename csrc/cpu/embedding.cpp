#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>

#include "layout.h"
#include "operator_checks.h"
#include "cpu/examples_with_weight.h"
#include "cpu/grain.h"
#include "cpu/isa/row_kernels.h"

namespace l2rw {
namespace {

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

template <class Body>
auto with_index(const Tensor& index, const Body& body) {
  return index.scalar_type() == ScalarType::Long ? body(int64_t{}) : body(int32_t{});
}

// Every index is a row of `table`, which has so many.
void check_range(const char* operation, const Tensor& index, const char* table, int64_t rows) {
  with_index(index, [&](auto zero) {
    using I = decltype(zero);
    for (int64_t i = 0; i < index.size(0); ++i) {
      for (int64_t t = 0; t < index.size(1); ++t) {
        const int64_t row = data<I>(index)[i * index.stride(0) + t * index.stride(1)];
        check(
            row >= 0 && row < rows,
            operation,
            "index[",
            i,
            ", ",
            t,
            "] is ",
            row,
            ", and ",
            table,
            " has ",
            rows,
            " rows");
      }
    }
  });
}

Tensor embedding_correlation(const Tensor& index, const Tensor& g, const Tensor& direction) {
  check_embedding_correlation(index, g, direction);
  check_range("embedding_correlation", index, "direction", direction.size(0));

  const ScalarType dtype = g.scalar_type();
  Tensor u = torch::stable::new_empty(g, {g.size(0)}, accumulation_dtype(dtype));
  dispatch_floating(dtype, [&](auto element) {
    using T = decltype(element);
    with_index(index, [&](auto zero) {
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

// Positions sorted by their row of the table, so that each row of the result is written once.
template <class T, class I>
void add_rows(const Tensor& index, const Tensor& g, const Tensor& weights, const Tensor& total) {
  using A = accumulation_t<T>;
  const int64_t positions = g.size(1);
  const int64_t width = g.size(2);
  const int64_t rows = total.size(0);
  const std::vector<int64_t> examples = examples_with_weight<A>(weights);
  const auto row_of = [&](int64_t i, int64_t t) {
    return static_cast<size_t>(data<I>(index)[i * index.stride(0) + t * index.stride(1)]);
  };
  // Where the positions of each row end; while they are sorted in, where the next one goes.
  std::vector<int64_t> ends(static_cast<size_t>(rows) + 1);
  for (const int64_t i : examples) {
    for (int64_t t = 0; t < positions; ++t) {
      ++ends[row_of(i, t) + 1];
    }
  }
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  const auto count = static_cast<size_t>(ends.back());
  std::vector<const T*> starts(count);
  std::vector<A> factors(count);
  for (const int64_t i : examples) {
    for (int64_t t = 0; t < positions; ++t) {
      const auto place = static_cast<size_t>(ends[row_of(i, t)]++);
      starts[place] = data<T>(g) + i * g.stride(0) + t * g.stride(1);
      factors[place] = data<A>(weights)[i * weights.stride(0)];
    }
  }
  const int64_t work = width * (1 + static_cast<int64_t>(count) / std::max<int64_t>(rows, 1));
  torch::stable::parallel_for(0, rows, grain_of(work), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row == 0 ? 0 : ends[static_cast<size_t>(row) - 1];
      L2RW_ISA_CALL(
          RowKernels<T>::combine,
          starts.data() + first,
          g.stride(2),
          factors.data() + first,
          ends[static_cast<size_t>(row)] - first,
          data<A>(total) + row * width,
          width);
    }
  });
}

Tensor embedding_weighted_gradient(
    const Tensor& index, const Tensor& g, const Tensor& weights, int64_t rows) {
  constexpr const char* operation = "embedding_weighted_gradient";
  check_embedding(operation, index, g);
  check_vector(operation, {"g", g}, "weights", weights, g.size(0), "examples of g");
  check(rows >= 0, operation, "rows must be at least 0, got ", rows);
  check_range(operation, index, "the weight", rows);

  const ScalarType dtype = g.scalar_type();
  Tensor total = torch::stable::new_empty(g, {rows, g.size(2)}, accumulation_dtype(dtype));
  const Tensor w = *in_accumulation_dtype(weights);
  dispatch_floating(dtype, [&](auto element) {
    with_index(
        index, [&](auto zero) { add_rows<decltype(element), decltype(zero)>(index, g, w, total); });
  });
  return total;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) {
  m.impl("embedding_correlation", TORCH_BOX(&embedding_correlation));
  m.impl("embedding_weighted_gradient", TORCH_BOX(&embedding_weighted_gradient));
}

}  // namespace l2rw
