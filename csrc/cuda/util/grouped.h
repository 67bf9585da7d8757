#pragma once

// Grouped launches: the work of several layers in one kernel.

#include <cstdint>
#include <limits>

#include "cuda/util/host_device.h"

namespace l2rw::cuda {

// As many layers as fit into the arguments of a kernel.
constexpr int kMaxLayers = 20;

// Divides the numbers 0 ... total - 1, of blocks or of terms, among at most Capacity layers in
// order, and holds what a kernel needs to know of each layer. It is passed to kernels by value.
template <class Entry, int Capacity>
struct GroupedLayers {
  static constexpr int kCapacity = Capacity;
  int64_t total = 0;
  int64_t first[Capacity];  // the first number of a layer
  Entry entries[Capacity] = {};
  int layers = 0;

  GroupedLayers() {
    for (int layer = 0; layer < Capacity; ++layer) {
      first[layer] = std::numeric_limits<int64_t>::max();
    }
  }

  void add(const Entry& entry, int64_t count) {
    first[layers] = total;
    entries[layers] = entry;
    total += count;
    ++layers;
  }

  // Every thread compares with all layers, without a branch: a search would wait for each answer.
  L2RW_HOST_DEVICE int layer_of(int64_t number) const {
    int layer = 0;
    L2RW_UNROLL
    for (int later = 1; later < Capacity; ++later) {
      layer += number >= first[later] ? 1 : 0;
    }
    return layer;
  }
};

}  // namespace l2rw::cuda
