#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "collapse.h"
#include "layout.h"
#include "operator_checks.h"
#include "cpu/example_products.h"
#include "cpu/examples_with_weight.h"
#include "cpu/grain.h"
#include "cpu/isa/row_kernels.h"

namespace l2rw {
namespace {

constexpr const char* kOperation = "linear_weighted_gradient";

// The number of positions from which an example's gradient is worth a matrix product of its own:
// examples are then multiplied one by one, faster than gathered and multiplied.
constexpr int64_t kBlockedPositions = 16;

// Some examples of a tensor [n, *] in memory of their own and without gaps, each times its weight.
// No weights: as they are.
template <class T>
Tensor gather(
    const Tensor& tensor, const std::vector<int64_t>& examples, const OptionalTensor& weights) {
  using A = accumulation_t<T>;
  Sizes shape(tensor.sizes().begin(), tensor.sizes().end());
  shape[0] = static_cast<int64_t>(examples.size());
  const Tensor gathered = torch::stable::new_empty(tensor, shape);
  if (gathered.numel() == 0) {
    return gathered;
  }
  const Runs runs(
      Sizes(tensor.sizes().begin() + 1, tensor.sizes().end()),
      Sizes(tensor.strides().begin() + 1, tensor.strides().end()));
  const int64_t count = shape[0] * runs.count;
  torch::stable::parallel_for(0, count, grain_of(runs.length), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = examples[k / runs.count];
      L2RW_ISA_CALL(
          RowKernels<T>::scale,
          data<T>(tensor) + i * tensor.stride(0) + runs.offset(k % runs.count),
          runs.stride,
          weights ? data<A>(weights)[i * weights->stride(0)] : A(1),
          data<T>(gathered) + k * runs.length,
          runs.length);
    }
  });
  return gathered;
}

// The rows of all examples in a tensor [n, T, (h,) d], as a matrix for each head.
struct Matrices {
  explicit Matrices(Tensor rows) : tensor(std::move(rows)) {
    if (!even()) {
      tensor = torch::stable::contiguous(tensor);
    }
  }

  // Whether one stride leads from each row to the next.
  bool even() const {
    return tensor.size(0) == 1 || tensor.size(1) == 1 ||
           tensor.stride(0) == tensor.size(1) * tensor.stride(1);
  }

  // [(h,) rows, d], or [(h,) d, rows], in the tensor's memory and on its own: no autograd state is
  // carried along.
  Tensor view(bool transposed) const {
    const int64_t last = tensor.dim() - 1;
    Sizes sizes{tensor.size(0) * tensor.size(1), tensor.size(last)};
    Sizes strides{tensor.stride(tensor.size(1) == 1 ? 0 : 1), tensor.stride(last)};
    if (transposed) {
      std::swap(sizes[0], sizes[1]);
      std::swap(strides[0], strides[1]);
    }
    if (last == 3) {
      sizes.insert(sizes.begin(), tensor.size(2));
      strides.insert(strides.begin(), tensor.stride(2));
    }
    return torch::stable::from_blob(
        tensor.data_ptr(), sizes, strides, tensor.device(), tensor.scalar_type());
  }

  Tensor tensor;
};

// product = a b. Autocast does not reach a call that says where the result goes.
void multiply(const Tensor& a, const Tensor& b, const Tensor& product) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(product)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(
      product.dim() == 2 ? "aten::mm" : "aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // which owns one more reference
}

void check_arguments(const Tensor& z, const Tensor& g, const Tensor& weights) {
  check(
      z.dim() == 3 || z.dim() == 4,
      kOperation,
      "z must have 3 or 4 dimensions (examples, positions, perhaps heads, width), got shape ",
      shape_of(z));
  check_dim(kOperation, {"g", g}, z.dim());
  check_floating(kOperation, {"z", z});
  check_same(kOperation, {"z", z}, {"g", g});
  constexpr std::array<const char*, 3> sizes{"examples of z", "positions of z", "heads of z"};
  for (int64_t d = 0; d < z.dim() - 1; ++d) {
    check_size(kOperation, {"g", g}, d, z.size(d), sizes[static_cast<size_t>(d)]);
  }
  check_vector(kOperation, {"z", z}, "weights", weights, z.size(0), "examples of z");
}

std::tuple<Tensor, Tensor> linear_weighted_gradient(
    const Tensor& z,
    const Tensor& g,
    const Tensor& weights,
    bool bias,
    bool inputs_first,
    bool wide) {
  check_arguments(z, g, weights);
  const ScalarType accumulation = accumulation_dtype(z.scalar_type());
  const ScalarType dtype = wide ? accumulation : z.scalar_type();
  const Sizes outputs(g.sizes().begin() + 2, g.sizes().end());
  Tensor sums = torch::stable::new_empty(g, bias ? outputs : Sizes{0}, dtype);
  const Tensor w = *in_accumulation_dtype(weights);

  if (z.dim() == 3 && z.size(1) >= kBlockedPositions && z.size(2) > 0 && g.size(2) > 0) {
    Tensor gradient = torch::stable::new_empty(z, {g.size(2), z.size(2)}, accumulation);
    Tensor all_sums = torch::stable::new_empty(z, outputs, accumulation);
    dispatch_accumulation(accumulation, [&](auto zero) {
      using A = decltype(zero);
      form_weighted_sum<A>(
          as_convolution(z, g),
          image_of_rows(z),
          image_of_rows(g),
          data<A>(torch::stable::contiguous(w)),
          data<A>(gradient),
          data<A>(all_sums));
    });
    if (inputs_first) {
      gradient = torch::stable::contiguous(torch::stable::transpose(gradient, 0, 1));
    }
    return {torch::stable::to(gradient, dtype), bias ? torch::stable::to(all_sums, dtype) : sums};
  }

  return dispatch_floating(z.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    const std::vector<int64_t> examples = examples_with_weight<accumulation_t<T>>(w);
    const auto count = static_cast<int64_t>(examples.size());
    const Tensor scaled = gather<T>(g, examples, w);
    if (bias) {
      sums = torch::stable::sum(scaled, std::array<int64_t, 2>{0, 1}, false, dtype);
    }
    Sizes shape(z.sizes().begin() + 2, z.sizes().end());
    shape.insert(inputs_first ? shape.end() : shape.end() - 1, outputs.back());
    Tensor gradient = torch::stable::new_empty(z, shape, dtype);
    if (count * z.size(1) == 0 || gradient.numel() == 0) {
      return {torch::stable::zero_(gradient), sums};
    }
    const Tensor kept = count == z.size(0) ? z : gather<T>(z, examples, std::nullopt);
    const Matrices left(torch::stable::to(inputs_first ? kept : scaled, dtype));
    const Matrices right(torch::stable::to(inputs_first ? scaled : kept, dtype));
    multiply(left.view(true), right.view(false), gradient);
    return {gradient, sums};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) {
  m.impl("linear_weighted_gradient", TORCH_BOX(&linear_weighted_gradient));
}

}  // namespace l2rw
