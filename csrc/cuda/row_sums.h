#pragma once

// What a thread does with the sums of its part of a tile. As tile_index.h, the same on the host and
// the device. A is the accumulation type.

#include <cstdint>

#include "cuda/tile_plan.h"

namespace l2rw::cuda {

template <class Tile, class A>
using Sums = A[Tile::kThreadRows][Tile::kThreadColumns];

template <class Tile, class A>
L2RW_HOST_DEVICE void clear(Sums<Tile, A>& sums) {
  L2RW_UNROLL
  for (int r = 0; r < Tile::kThreadRows; ++r) {
    L2RW_UNROLL
    for (int c = 0; c < Tile::kThreadColumns; ++c) {
      sums[r][c] = A(0);
    }
  }
}

template <class Tile, class A>
L2RW_HOST_DEVICE void add(Sums<Tile, A>& sums, const Sums<Tile, A>& more) {
  L2RW_UNROLL
  for (int r = 0; r < Tile::kThreadRows; ++r) {
    L2RW_UNROLL
    for (int c = 0; c < Tile::kThreadColumns; ++c) {
      sums[r][c] += more[r][c];
    }
  }
}

// Equation (12). The chunks of z come first in a unit, those of g follow. The product is linear in
// G G'ᵀ once Z Z'ᵀ is complete, so partial sums of the second need no place of their own.
template <class Tile, class A>
struct FactoredSums {
  int64_t z_chunks;
  A bias;
  Sums<Tile, A> inner;             // Z Z'ᵀ + bias
  A rows[Tile::kThreadRows] = {};  // the result, a part of every row of this thread

  L2RW_HOST_DEVICE FactoredSums(int64_t z_chunks, A bias) : z_chunks(z_chunks), bias(bias) {
    clear<Tile, A>(inner);
  }
  // Whether sums must be handed over after this chunk.
  L2RW_HOST_DEVICE bool complete(const Walk& walk) const {
    return walk.chunk + 1 == z_chunks || walk.ends_unit();
  }
  L2RW_HOST_DEVICE void take(const Walk& walk, const Sums<Tile, A>& sums) {
    if (walk.chunk < z_chunks) {
      add<Tile, A>(inner, sums);
      if (walk.chunk + 1 == z_chunks) {
        L2RW_UNROLL
        for (int r = 0; r < Tile::kThreadRows; ++r) {
          L2RW_UNROLL
          for (int c = 0; c < Tile::kThreadColumns; ++c) {
            inner[r][c] += bias;
          }
        }
      }
      return;
    }
    L2RW_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      A sum = 0;
      L2RW_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        sum += inner[r][c] * sums[r][c];
      }
      rows[r] += sum;
    }
    if (walk.ends_unit()) {
      clear<Tile, A>(inner);
    }
  }
};

// One Gram matrix, or a part of it.
template <class Tile, class A>
struct GramSums {
  Sums<Tile, A> total;

  L2RW_HOST_DEVICE GramSums() { clear<Tile, A>(total); }
  L2RW_HOST_DEVICE bool complete(const Walk& walk) const { return walk.ends_unit(); }
  L2RW_HOST_DEVICE void take(const Walk&, const Sums<Tile, A>& sums) { add<Tile, A>(total, sums); }
};

// The same number, from which nothing is computed ahead of this place: what is needed after a loop
// would take registers in it.
L2RW_HOST_DEVICE int not_before(int value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// g . (V z + V_b). `Gradient` has G and V_b: `whole(column)` says whether all of the tile's rows,
// and columns from `column` on, exist and can be read in packs; `here()` is the same object;
// `read<whole>(row, column, values)` reads Tile::kAdjacent numbers of G, `offset<whole>(column)`
// one of V_b, both zero where none exist.
template <class Tile, class A, class Gradient>
struct DenseSums {
  int thread;
  const Gradient& gradient;
  Sums<Tile, A> total;
  A rows[Tile::kThreadRows] = {};

  L2RW_HOST_DEVICE DenseSums(int thread, const Gradient& gradient)
      : thread(thread), gradient(gradient) {
    clear<Tile, A>(total);
  }
  L2RW_HOST_DEVICE bool complete(const Walk& walk) const { return walk.ends_unit(); }
  L2RW_HOST_DEVICE void take(const Walk& walk, const Sums<Tile, A>& sums) {
    add<Tile, A>(total, sums);
    if (!walk.ends_unit()) {
      return;
    }
    const int64_t first = walk.column_tile() * Tile::kColumns;
    const bool has_offset = walk.split() == 0;  // the parts of a depth share one offset
    // Most tiles are whole: nothing stands between their reads, and many are under way at a time.
    const Gradient here = gradient.here();
    if (here.whole(first)) {
      multiply<true>(here, not_before(thread), first, has_offset);
    } else {
      multiply<false>(here, not_before(thread), first, has_offset);
    }
    clear<Tile, A>(total);
  }

 private:
  template <bool Whole>
  L2RW_HOST_DEVICE void multiply(const Gradient& here, int place, int64_t first, bool has_offset) {
    if (has_offset && here.has_bias()) {
      L2RW_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        const A offset = here.template offset<Whole>(first + Tile::column(place, c));
        L2RW_UNROLL
        for (int r = 0; r < Tile::kThreadRows; ++r) {
          total[r][c] += offset;
        }
      }
    }
    L2RW_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      A sum = 0;
      const int at = not_before(place);
      L2RW_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; c += Tile::kAdjacent) {
        A values[Tile::kAdjacent];
        here.template read<Whole>(Tile::row(at, r), first + Tile::column(at, c), values);
        L2RW_UNROLL
        for (int k = 0; k < Tile::kAdjacent; ++k) {
          sum += values[k] * total[r][c + k];
        }
      }
      rows[r] += sum;
    }
  }
};

// One stage of a product by ordinary multiply-adds, straight from shared memory.
template <class T>
struct alignas(kVectorBytes) Vector {
  static constexpr int kCount = kVectorBytes / sizeof(T);
  T values[kCount];
};

template <class Tile, class T>
L2RW_HOST_DEVICE void multiply_plainly(const char* stage, int thread, Sums<Tile, T>& sums) {
  L2RW_DO_NOT_UNROLL
  for (int vector = 0; vector < kLineVectors; ++vector) {
    Vector<T> left[Tile::kThreadRows];
    L2RW_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      left[r] =
          *reinterpret_cast<const Vector<T>*>(stage + shared_offset(Tile::row(thread, r), vector));
    }
    L2RW_UNROLL
    for (int c = 0; c < Tile::kThreadColumns; ++c) {
      const Vector<T> right = *reinterpret_cast<const Vector<T>*>(
          stage + shared_offset(Tile::kRows + Tile::column(thread, c), vector));
      L2RW_UNROLL
      for (int k = 0; k < Vector<T>::kCount; ++k) {
        L2RW_UNROLL
        for (int r = 0; r < Tile::kThreadRows; ++r) {
          sums[r][c] += left[r].values[k] * right.values[k];
        }
      }
    }
  }
}

}  // namespace l2rw::cuda
