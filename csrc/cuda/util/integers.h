#pragma once

// Arithmetic of sizes: quotients that are rounded up, ranges that are divided evenly, and fast
// division by a number that the host knows.

#include <cstdint>

#include "cuda/util/host_device.h"

namespace l2rw::cuda {

L2RW_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t begin;
  int64_t end;
};

// Part `part` of `parts` equal parts of 0 ... count - 1. No part is empty if there are at most
// `count`.
L2RW_HOST_DEVICE constexpr Range split_range(int64_t count, int64_t parts, int64_t part) {
  return {count * part / parts, count * (part + 1) / parts};
}

// Divides 0 <= n < 2^31 by 1 <= d < 2^31 with one multiplication. With L = ceil(log2 d) and
// m = ceil(2^(31 + L) / d), which has 32 bits, n / d = floor(n m / 2^(31 + L)): m is too large by
// less than d / d <= 2^L / d, so the product by less than 2^(31 + L) / d.
class Divisor {
 public:
  explicit Divisor(int64_t divisor) : divisor_(static_cast<int32_t>(divisor)) {
    int bits = 0;
    while ((int64_t{1} << bits) < divisor) {
      ++bits;
    }
    factor_ = static_cast<uint32_t>(((uint64_t{1} << (31 + bits)) - 1) / divisor + 1);
    shift_ = 31 + bits;
  }

  L2RW_HOST_DEVICE int32_t divide(int32_t n) const {
    return static_cast<int32_t>((uint64_t{static_cast<uint32_t>(n)} * factor_) >> shift_);
  }
  L2RW_HOST_DEVICE int32_t divisor() const { return divisor_; }

 private:
  int32_t divisor_;
  uint32_t factor_;
  int32_t shift_;
};

}  // namespace l2rw::cuda
