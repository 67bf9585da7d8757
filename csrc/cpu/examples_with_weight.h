#pragma once

#include <cstdint>
#include <vector>

#include "checks.h"

namespace l2rw {

// The examples with w_i != 0. The others are never read: 0 * NaN is NaN.
template <class A>
std::vector<int64_t> examples_with_weight(const Tensor& weights) {  // [n]
  std::vector<int64_t> examples;
  for (int64_t i = 0; i < weights.size(0); ++i) {
    if (data<A>(weights)[i * weights.stride(0)] != A(0)) {
      examples.push_back(i);
    }
  }
  return examples;
}

}  // namespace l2rw
