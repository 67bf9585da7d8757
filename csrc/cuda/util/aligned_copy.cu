#include "cuda/util/aligned_copy.cuh"

#include <cstdint>

#include "cuda/util/integers.h"
#include "cuda/util/types.cuh"
#include "cuda/util/vectors.h"

namespace l2rw::cuda {
namespace {

constexpr int kTileSide = 32;
constexpr int kBlockRows = 8;

// One block copies 32 positions by 32 features of one example. Neighbouring threads read whichever
// of the two is contiguous, and write contiguous features.
template <class From, class To, bool ByPosition>
__global__ void __launch_bounds__(kTileSide* kBlockRows) copy_rows(
    const From* __restrict__ from,  // [n, T, d], strides
    int64_t example_stride,
    int64_t position_stride,
    int64_t feature_stride,
    int64_t positions,
    int64_t features,
    unsigned position_tiles,
    unsigned feature_tiles,
    To* __restrict__ to,  // [n, T, pitch]
    int64_t pitch) {
  __shared__ To tile[kTileSide][kTileSide + 1];
  const int64_t example = blockIdx.x / (position_tiles * feature_tiles);
  const int64_t first_position = int64_t{blockIdx.x / feature_tiles % position_tiles} * kTileSide;
  const int64_t first_feature = int64_t{blockIdx.x % feature_tiles} * kTileSide;
  const From* const start = from + example * example_stride;
  const auto x = static_cast<int>(threadIdx.x);
  for (int y = static_cast<int>(threadIdx.y); y < kTileSide; y += kBlockRows) {
    const int64_t t = first_position + (ByPosition ? x : y);
    const int64_t f = first_feature + (ByPosition ? y : x);
    if (t < positions && f < features) {
      const auto value = static_cast<To>(start[t * position_stride + f * feature_stride]);
      if constexpr (ByPosition) {
        tile[x][y] = value;
      } else {
        to[(example * positions + t) * pitch + f] = value;
      }
    }
  }
  if constexpr (ByPosition) {
    __syncthreads();
    for (int y = static_cast<int>(threadIdx.y); y < kTileSide; y += kBlockRows) {
      const int64_t t = first_position + y;
      const int64_t f = first_feature + x;
      if (t < positions && f < features) {
        to[(example * positions + t) * pitch + f] = tile[y][x];
      }
    }
  }
}

// The stride of the rows in elements, or -1 if they are not evenly spaced.
int64_t row_stride(const Tensor& tensor) {
  const int64_t n = tensor.size(0);
  const int64_t positions = tensor.size(1);
  if (n * positions == 1) {
    return 0;
  }
  if (positions == 1) {
    return tensor.stride(0);
  }
  if (n == 1 || tensor.stride(0) == positions * tensor.stride(1)) {
    return tensor.stride(1);
  }
  return -1;
}

bool is_aligned(const Tensor& tensor, int64_t element_bytes) {
  const int64_t stride = row_stride(tensor);
  return (tensor.size(2) == 1 || tensor.stride(2) == 1) && stride >= 0 &&
         stride * element_bytes % kVectorBytes == 0 &&
         reinterpret_cast<uintptr_t>(tensor.data_ptr()) % kVectorBytes == 0;
}

}  // namespace

AlignedMatrix align_matrix(const Launch& launch, const Tensor& tensor, ScalarType dtype) {
  const int64_t n = tensor.size(0);
  const int64_t positions = tensor.size(1);
  const int64_t features = tensor.size(2);
  const int64_t bytes = bytes_of(dtype);
  const auto view = [&](const Tensor& rows, int64_t stride) {
    return MatrixView{
        static_cast<const char*>(rows.data_ptr()), stride * bytes, n * positions, features * bytes};
  };
  if (features == 0 || (tensor.scalar_type() == dtype && is_aligned(tensor, bytes))) {
    return {tensor, view(tensor, features == 0 ? 0 : row_stride(tensor))};
  }

  const int64_t pitch = ceil_div(features * bytes, kVectorBytes) * kVectorBytes / bytes;
  Tensor rows = torch::stable::new_empty(tensor, {n * positions, pitch}, dtype);
  const int64_t position_tiles = ceil_div(positions, kTileSide);
  const int64_t feature_tiles = ceil_div(features, kTileSide);
  const bool by_position = features > 1 && positions > 1 && tensor.stride(1) < tensor.stride(2);
  dispatch_device_type(tensor.scalar_type(), [&](auto source) {
    using From = decltype(source);
    const auto copy = [&](auto target) {
      using To = decltype(target);
      launch.run(
          by_position ? &copy_rows<From, To, true> : &copy_rows<From, To, false>,
          n * position_tiles * feature_tiles,
          dim3(kTileSide, kBlockRows),
          0,
          data<From>(tensor),
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2),
          positions,
          features,
          static_cast<unsigned>(position_tiles),
          static_cast<unsigned>(feature_tiles),
          data<To>(rows),
          pitch);
    };
    if (tensor.scalar_type() == dtype) {
      copy(From{});
    } else if constexpr (sizeof(From) == 2) {
      copy(float{});  // the accumulation dtype is the only wider one
    }
  });
  return {rows, view(rows, pitch)};
}

}  // namespace l2rw::cuda
