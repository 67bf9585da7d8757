#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "operator_checks.h"
#include "cuda/launch.cuh"
#include "cuda/partial_sums.h"
#include "cuda/reduce.cuh"
#include "cuda/sheets.h"
#include "cuda/types.cuh"

namespace l2rw {
namespace cuda {
namespace {

// A mean, a factor or a direction, in the accumulation dtype. Without data there is none.
template <class A>
struct Side {
  const A* data;
  SheetStrides strides;
};

template <class T>
struct Sheets {
  const T* x;
  SheetStrides x_strides;
  const T* g;
  SheetStrides g_strides;
  Side<accumulation_t<T>> mean;
  Side<accumulation_t<T>> rstd;
  int64_t outer;
  int64_t inner;
};

template <class T, int Count>
__device__ __forceinline__ void load(const T* from, T (&values)[Count]) {
  const auto pack = *reinterpret_cast<const Pack<T, Count>*>(from);
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    values[k] = pack.values[k];
  }
}

// Count numbers of a side along the inner dimension.
template <class A, int Count>
__device__ __forceinline__ void load_side(
    const Side<A>& side,
    int64_t example,
    int64_t outer,
    int64_t inner,
    A absent,
    A (&values)[Count]) {
  const A* const from = side.data + example * side.strides.example + outer * side.strides.outer +
                        inner * side.strides.inner;
  if (side.data != nullptr && side.strides.inner == 1 && Count * sizeof(A) % 16 == 0) {
    constexpr int kStep = Count * sizeof(A) % 16 == 0 ? 16 / sizeof(A) : 1;
#pragma unroll
    for (int k = 0; k < Count; k += kStep) {
      const auto pack = *reinterpret_cast<const Pack<A, kStep>*>(from + k);
#pragma unroll
      for (int e = 0; e < kStep; ++e) {
        values[k + e] = pack.values[e];
      }
    }
    return;
  }
  const bool shared = side.data == nullptr || side.strides.inner == 0;
  const A first = side.data == nullptr ? absent : *from;
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    values[k] = shared ? first : from[k * side.strides.inner];
  }
}

// g and g x^ of Count elements.
template <class T, int Count>
__device__ __forceinline__ void load_products(
    const Sheets<T>& sheets,
    int64_t example,
    int64_t outer,
    int64_t inner,
    accumulation_t<T> (&gradients)[Count],
    accumulation_t<T> (&products)[Count]) {
  using A = accumulation_t<T>;
  T x[Count];
  T g[Count];
  A mean[Count];
  A rstd[Count];
  load(
      sheets.x + example * sheets.x_strides.example + outer * sheets.x_strides.outer +
          inner * sheets.x_strides.inner,
      x);
  load(
      sheets.g + example * sheets.g_strides.example + outer * sheets.g_strides.outer +
          inner * sheets.g_strides.inner,
      g);
  load_side(sheets.mean, example, outer, inner, A(0), mean);
  load_side(sheets.rstd, example, outer, inner, A(1), rstd);
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    gradients[k] = static_cast<A>(g[k]);
    products[k] = gradients[k] * ((static_cast<A>(x[k]) - mean[k]) * rstd[k]);
  }
}

// A block's part of an example: all terms of u_i in it.
template <class T, int Count>
__global__ void __launch_bounds__(kSheetThreads) correlate(
    const __grid_constant__ Sheets<T> sheets,
    const __grid_constant__ Side<accumulation_t<T>> direction,
    const __grid_constant__ Side<accumulation_t<T>> direction_bias,
    SheetParts parts,
    int64_t examples,
    accumulation_t<T>* __restrict__ partial) {  // [parts, n]
  using A = accumulation_t<T>;
  const int64_t example = blockIdx.x / parts.count;
  const int64_t part = blockIdx.x % parts.count;
  const Range range = parts.range(part, sheets.outer);
  A sum = 0;
  for (int64_t outer = range.begin + threadIdx.y; outer < range.end; outer += blockDim.y) {
    for (int64_t inner = int64_t{threadIdx.x} * Count; inner < sheets.inner;
         inner += int64_t{blockDim.x} * Count) {
      A gradients[Count];
      A products[Count];
      A factors[Count];
      load_products(sheets, example, outer, inner, gradients, products);
      A terms = 0;
      if (direction.data != nullptr) {
        load_side(direction, 0, outer, inner, A(0), factors);
#pragma unroll
        for (int k = 0; k < Count; ++k) {
          terms += products[k] * factors[k];
        }
      }
      if (direction_bias.data != nullptr) {
        load_side(direction_bias, 0, outer, inner, A(0), factors);
#pragma unroll
        for (int k = 0; k < Count; ++k) {
          terms += gradients[k] * factors[k];
        }
      }
      sum += terms;
    }
  }
  sum = block_sum<kSheetThreads>(sum);
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    partial[part * examples + example] = sum;
  }
}

// Sums over the outer dimension: G_i and Gb_i of Count channels for each thread of the first row.
// For sm_86 ptxas would keep to 40 registers and spill, were it not told how few blocks are enough.
template <class T, int Count>
__global__ void __launch_bounds__(kSheetThreads, 2) sum_outer(
    const __grid_constant__ Sheets<T> sheets,
    SheetParts parts,
    unsigned channel_blocks,
    int64_t examples,
    accumulation_t<T>* __restrict__ partial,         // [parts, n, d]
    accumulation_t<T>* __restrict__ partial_bias) {  // [parts, n, d]
  using A = accumulation_t<T>;
  __shared__ A sums[2][kSheetThreads][Count];
  const int64_t example = blockIdx.x / channel_blocks / parts.count;
  const int64_t part = blockIdx.x / channel_blocks % parts.count;
  const Range range = parts.range(part, sheets.outer);
  const int64_t inner = (int64_t{blockIdx.x % channel_blocks} * blockDim.x + threadIdx.x) * Count;
  A gradient[Count] = {};
  A bias_gradient[Count] = {};
  if (inner < sheets.inner) {
    for (int64_t outer = range.begin + threadIdx.y; outer < range.end; outer += blockDim.y) {
      A gradients[Count];
      A products[Count];
      load_products(sheets, example, outer, inner, gradients, products);
#pragma unroll
      for (int k = 0; k < Count; ++k) {
        gradient[k] += products[k];
        bias_gradient[k] += gradients[k];
      }
    }
  }
  const unsigned place = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    sums[0][place][k] = gradient[k];
    sums[1][place][k] = bias_gradient[k];
  }
  __syncthreads();
  if (threadIdx.y == 0 && inner < sheets.inner) {
    for (unsigned y = 1; y < blockDim.y; ++y) {
#pragma unroll
      for (int k = 0; k < Count; ++k) {
        gradient[k] += sums[0][y * blockDim.x + threadIdx.x][k];
        bias_gradient[k] += sums[1][y * blockDim.x + threadIdx.x][k];
      }
    }
    const int64_t to = (part * examples + example) * sheets.inner + inner;
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      partial[to + k] = gradient[k];
      partial_bias[to + k] = bias_gradient[k];
    }
  }
}

// Sums over the inner dimension: a warp takes one channel of one example.
template <class T, int Count>
__global__ void __launch_bounds__(kSheetThreads) sum_inner(
    const __grid_constant__ Sheets<T> sheets,
    int64_t examples,
    accumulation_t<T>* __restrict__ sums,         // [n, d]
    accumulation_t<T>* __restrict__ bias_sums) {  // [n, d]
  using A = accumulation_t<T>;
  constexpr int kWarps = kSheetThreads / 32;
  const int64_t channel = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t count = examples * sheets.outer;
  if (channel >= count) {
    return;  // the whole warp
  }
  const int64_t example = channel / sheets.outer;
  const int64_t outer = channel % sheets.outer;
  A gradient = 0;
  A bias_gradient = 0;
  for (int64_t inner = threadIdx.x % 32 * Count; inner < sheets.inner; inner += 32 * Count) {
    A gradients[Count];
    A products[Count];
    load_products(sheets, example, outer, inner, gradients, products);
    A terms = 0;
    A bias_terms = 0;
#pragma unroll
    for (int k = 0; k < Count; ++k) {
      terms += products[k];
      bias_terms += gradients[k];
    }
    gradient += terms;
    bias_gradient += bias_terms;
  }
  gradient = lane_sum<32>(gradient);
  bias_gradient = lane_sum<32>(bias_gradient);
  if (threadIdx.x % 32 == 0) {
    sums[channel] = gradient;
    bias_sums[channel] = bias_gradient;
  }
}

OptionalTensor in_accumulation_dtype(const OptionalTensor& tensor) {
  if (!tensor) {
    return std::nullopt;
  }
  const ScalarType dtype = accumulation_dtype(tensor->scalar_type());
  return tensor->scalar_type() == dtype ? *tensor : torch::stable::to(*tensor, dtype);
}

// The arguments of a layer as sheets. The inner dimension are the channels, unless the positions
// alone lie side by side in x.
class Layer {
 public:
  Layer(const Tensor& x, const Tensor& g, const OptionalTensor& mean, const OptionalTensor& rstd)
      : by_channel(x.stride(2) == 1 || x.size(2) == 1 || x.stride(1) != 1),
        x_(x),
        g_(g),
        mean_(in_accumulation_dtype(mean)),
        rstd_(in_accumulation_dtype(rstd)) {}

  int64_t outer() const { return x_.size(by_channel ? 1 : 2); }
  int64_t inner() const { return x_.size(by_channel ? 2 : 1); }

  SheetStrides strides(const Tensor& tensor) const {
    const auto stride = [&](int64_t d) { return tensor.size(d) == 1 ? 0 : tensor.stride(d); };
    const int64_t along = inner() == 1 ? 1 : 0;  // a single number lies beside itself
    return {stride(0), stride(by_channel ? 1 : 2), stride(by_channel ? 2 : 1) + along};
  }

  template <class A>
  Side<A> channels(const OptionalTensor& vector) const {
    Side<A> side{nullptr, {0, 0, 0}};
    if (vector) {
      const int64_t stride = vector->size(0) == 1 ? 0 : vector->stride(0);
      side.data = data<A>(*vector);
      (by_channel ? side.strides.inner : side.strides.outer) = stride;
    }
    return side;
  }

  template <class T>
  Sheets<T> sheets() const {
    using A = accumulation_t<T>;
    Sheets<T> sheets;
    sheets.x = data<T>(x_);
    sheets.x_strides = strides(x_);
    sheets.g = data<T>(g_);
    sheets.g_strides = strides(g_);
    sheets.mean = statistic<A>(mean_);
    sheets.rstd = statistic<A>(rstd_);
    sheets.outer = outer();
    sheets.inner = inner();
    return sheets;
  }

  const bool by_channel;

 private:
  template <class A>
  Side<A> statistic(const OptionalTensor& tensor) const {
    Side<A> side{nullptr, {0, 0, 0}};
    if (tensor) {
      const auto stride = [&](int64_t d) { return tensor->size(d) == 1 ? 0 : tensor->stride(d); };
      side.data = data<A>(*tensor);
      side.strides = {stride(0), stride(by_channel ? 1 : 2), stride(by_channel ? 2 : 1)};
    }
    return side;
  }

  Tensor x_;
  Tensor g_;
  OptionalTensor mean_;
  OptionalTensor rstd_;
};

template <class A>
bool fits_side(const Side<A>& side, int64_t inner, int64_t count) {
  return side.data == nullptr || side.strides.inner != 1 ||
         fits_vectors(reinterpret_cast<uint64_t>(side.data), sizeof(A), side.strides, inner, count);
}

template <class T>
bool fits_widest(
    const Sheets<T>& sheets,
    const Side<accumulation_t<T>>& scale,
    const Side<accumulation_t<T>>& shift) {
  constexpr int64_t kCount = kWidest<T>;
  const auto fits = [&](const T* data, SheetStrides strides) {
    return fits_vectors(reinterpret_cast<uint64_t>(data), sizeof(T), strides, sheets.inner, kCount);
  };
  return fits(sheets.x, sheets.x_strides) && fits(sheets.g, sheets.g_strides) &&
         fits_side(sheets.mean, sheets.inner, kCount) &&
         fits_side(sheets.rstd, sheets.inner, kCount) && fits_side(scale, sheets.inner, kCount) &&
         fits_side(shift, sheets.inner, kCount);
}

Tensor affine_correlation(
    const Tensor& x,
    const Tensor& g,
    const OptionalTensor& mean,
    const OptionalTensor& rstd,
    const OptionalTensor& direction,
    const OptionalTensor& direction_bias) {
  check_affine_correlation(x, g, mean, rstd, direction, direction_bias);
  const Launch launch("affine_correlation", x);
  const int64_t n = x.size(0);
  Tensor u = torch::stable::new_empty(x, {n}, accumulation_dtype(x.scalar_type()));
  if (x.numel() == 0) {
    return torch::stable::zero_(u);
  }
  const Layer layer(x, g, mean, rstd);
  const OptionalTensor V = in_accumulation_dtype(direction);
  const OptionalTensor V_b = in_accumulation_dtype(direction_bias);
  dispatch_device_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulation_t<T>;
    const Sheets<T> sheets = layer.template sheets<T>();
    const Side<A> scale = layer.template channels<A>(V);
    const Side<A> shift = layer.template channels<A>(V_b);
    const bool vectors = fits_widest<T>(sheets, scale, shift);
    const SheetThreads threads = sheet_threads(sheets.inner / (vectors ? kWidest<T> : 1));
    const SheetParts parts = parts_of_sheet(n, sheets.outer, threads, launch.processors());
    const Tensor partial =
        parts.count == 1 ? u : torch::stable::new_empty(u, {int64_t{parts.count}, n});
    launch.run(
        vectors ? &correlate<T, kWidest<T>> : &correlate<T, 1>,
        n * parts.count,
        dim3(static_cast<unsigned>(threads.across), static_cast<unsigned>(threads.down)),
        0,
        sheets,
        scale,
        shift,
        parts,
        n,
        data<A>(partial));
    if (parts.count > 1) {
      sum_positions(launch, partial, 1, u);
    }
  });
  return u;
}

std::tuple<Tensor, Tensor> affine_example_gradients(
    const Tensor& x, const Tensor& g, const OptionalTensor& mean, const OptionalTensor& rstd) {
  check_affine_layer("affine_example_gradients", x, g, mean, rstd);
  const Launch launch("affine_example_gradients", x);
  const int64_t n = x.size(0);
  const int64_t channels = x.size(2);
  const ScalarType accumulation = accumulation_dtype(x.scalar_type());
  Tensor gradients = torch::stable::new_empty(x, {n, channels}, accumulation);
  Tensor bias_gradients = torch::stable::new_empty(x, {n, channels}, accumulation);
  if (x.numel() == 0) {
    torch::stable::zero_(gradients);
    torch::stable::zero_(bias_gradients);
    return {gradients, bias_gradients};
  }
  const Layer layer(x, g, mean, rstd);
  dispatch_device_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulation_t<T>;
    const Sheets<T> sheets = layer.template sheets<T>();
    const Side<A> none{nullptr, {0, 0, 0}};
    const bool vectors = fits_widest<T>(sheets, none, none);
    const int64_t count = vectors ? kWidest<T> : 1;
    if (!layer.by_channel) {
      launch.run(
          vectors ? &sum_inner<T, kWidest<T>> : &sum_inner<T, 1>,
          ceil_div(n * channels, kSheetThreads / 32),
          kSheetThreads,
          0,
          sheets,
          n,
          data<A>(gradients),
          data<A>(bias_gradients));
      return;
    }
    const SheetThreads threads = sheet_threads(channels / count);
    const int64_t channel_blocks = ceil_div(channels / count, threads.across);
    const SheetParts parts =
        parts_of_sheet(n * channel_blocks, sheets.outer, threads, launch.processors());
    const auto workspace = [&](const Tensor& result) {
      return parts.count == 1
                 ? result
                 : torch::stable::new_empty(result, {int64_t{parts.count}, n * channels});
    };
    const Tensor partial = workspace(gradients);
    const Tensor partial_bias = workspace(bias_gradients);
    launch.run(
        vectors ? &sum_outer<T, kWidest<T>> : &sum_outer<T, 1>,
        n * parts.count * channel_blocks,
        dim3(static_cast<unsigned>(threads.across), static_cast<unsigned>(threads.down)),
        0,
        sheets,
        parts,
        static_cast<unsigned>(channel_blocks),
        n,
        data<A>(partial),
        data<A>(partial_bias));
    if (parts.count > 1) {
      sum_parts(launch, partial, gradients);
      sum_parts(launch, partial_bias, bias_gradients);
    }
  });
  return {gradients, bias_gradients};
}

}  // namespace
}  // namespace cuda

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) {
  m.impl("affine_correlation", TORCH_BOX(&cuda::affine_correlation));
  m.impl("affine_example_gradients", TORCH_BOX(&cuda::affine_example_gradients));
}

}  // namespace l2rw
