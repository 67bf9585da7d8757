#pragma once

// How the memory-bound kernels divide examples [outer, inner] among blocks: an example is cut into
// segments of its outer dimension, and the threads of a block take vectors of the inner one, which
// is contiguous.

#include <algorithm>
#include <cstdint>

#include "cuda/util/host_device.h"
#include "cuda/util/integers.h"

namespace l2rw::cuda {

constexpr int kBlockThreads = 256;

// A block of 256 threads: x along the inner dimension, y along the outer one.
struct BlockShape {
  int x;
  int y;
};

inline BlockShape block_shape(int64_t inner_vectors) {
  int x = 1;
  while (x < kBlockThreads && x < inner_vectors) {
    x *= 2;
  }
  return {x, kBlockThreads / x};
}

// Segments of `rows` each, the last one of what is left.
struct Segments {
  unsigned count;
  int64_t rows;

  L2RW_HOST_DEVICE Range range(int64_t segment, int64_t outer) const {
    const int64_t end = (segment + 1) * rows;
    return {segment * rows, end < outer ? end : outer};
  }
};

// As many segments as let `examples` examples occupy all processors. Each is at least one pass of
// the block's threads.
inline Segments segments_of(int64_t examples, int64_t outer, BlockShape block, int64_t processors) {
  constexpr int64_t kBlocksPerProcessor = 8;
  const int64_t wanted = ceil_div(kBlocksPerProcessor * processors, std::max<int64_t>(1, examples));
  const int64_t rows = ceil_div(outer, std::clamp<int64_t>(ceil_div(outer, block.y), 1, wanted));
  return {static_cast<unsigned>(ceil_div(outer, rows)), rows};
}

}  // namespace l2rw::cuda
