#pragma once

// The operands of Z Vᵀ of a linear layer. As tile_index.h, plain arithmetic.

#include <cstdint>

#include "cuda/tile_plan.h"

namespace l2rw::cuda {

struct LinearRows {
  static constexpr bool kOneProduct = true;
  Operand z;  // [n T, i]
  Operand V;  // [o, i]

  // Loads the stages of a tile.
  template <class Tile>
  class Loader {
   public:
    static constexpr int kTableBytes = 0;

    // There is one product, and no table.
    L2RW_HOST_DEVICE Loader(const LinearRows& operands, int32_t, int32_t row_tile, char*)
        : operands_(operands), row_tile_(row_tile) {}

    template <class Copy>
    L2RW_HOST_DEVICE void load(int thread, const Walk& step, const Copy& copy) const {
      for_each_vector<Tile>(
          thread,
          operands_.z,
          int64_t{row_tile_} * Tile::kRows,
          operands_.V,
          step.column_tile() * Tile::kColumns,
          int64_t{step.chunk} * kLineBytes,
          copy);
    }

   private:
    const LinearRows& operands_;
    int32_t row_tile_;
  };
};

}  // namespace l2rw::cuda
