#pragma once

// Several layers in one launch. As tile_index.h, the same on the host and the device.

#include <cstdint>
#include <limits>

#include "cuda/tile_index.h"

namespace l2rw::cuda {

// As many as fit into the arguments of a kernel.
constexpr int kMostLayers = 20;

// The numbers 0 ... total - 1, of blocks or of terms, divided among at most Capacity layers in
// order, and what is to be known of each layer. It is the argument of a kernel, by value.
template <class Entry, int Capacity>
struct LayerTable {
  static constexpr int kCapacity = Capacity;
  int64_t total = 0;
  int64_t first[Capacity];  // the first number of a layer
  Entry entries[Capacity] = {};
  int layers = 0;

  LayerTable() {
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

  // Every thread compares with all of them, without a branch: a search would wait for each answer.
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
