#pragma once

// Which kernels multiply which dtype.

#include "checks.h"
#include "cuda/launch.cuh"
#include "cuda/matmul_precision.h"
#include "cuda/product.cuh"
#include "cuda/warpgroup_engine.cuh"

namespace l2rw::cuda {

// Tiles for tensor cores: one that multiplies fastest, one for products of few rows or columns, and
// one for as few columns as the channels of small convolutions.
template <class T>
struct MatrixEngines {
  using Large = MatrixEngine<T, MatrixTile<128, 128, 64, 32>, 1>;
  using Small = MatrixEngine<T, MatrixTile<64, 64, 32, 32>, 3>;
  using Narrow = MatrixEngine<T, MatrixTile<128, 32, 32, 32>, 3>;
};

template <class T, int Columns>
struct WarpgroupEngines : MatrixEngines<T> {
  using Large = WarpgroupEngine<T, Columns>;
};

template <class T>
struct PlainEngines {
  using Large = PlainEngine<T, PlainTile<64, 128>>;
  using Small = Large;
  using Narrow = PlainEngine<T, PlainTile<128, 32>>;
};

// Calls run(Engine{}) with the tile of a plan.
template <class Engines, class Run>
void with_tile(const ProductPlan& plan, const Run& run) {
  if (plan.large) {
    run(typename Engines::Large{});
  } else {
    run(typename Engines::Small{});
  }
}

// Calls body(Engines{}) with the way to multiply numbers of a floating dtype.
template <class Body>
void with_engines(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(PlainEngines<double>{});
    case ScalarType::BFloat16:
      return body(MatrixEngines<__nv_bfloat16>{});
    case ScalarType::Half:
      return body(MatrixEngines<__half>{});
    default:
      if (tf32_allowed()) {
        return body(MatrixEngines<float>{});
      }
      return body(PlainEngines<float>{});
  }
}

// The engines of products of rows, which have other large tiles on some devices: there
// `with_warpgroups(T{})` is called, for numbers of two bytes.
template <class WithWarpgroups, class Body>
void choose_row_engines(
    const Launch& launch,
    ScalarType dtype,
    const WithWarpgroups& with_warpgroups,
    const Body& body) {
  if (launch.warpgroups() && dtype == ScalarType::BFloat16) {
    with_warpgroups(__nv_bfloat16{});
  } else if (launch.warpgroups() && dtype == ScalarType::Half) {
    with_warpgroups(__half{});
  } else {
    with_engines(dtype, body);
  }
}

// Calls body(Engines{}) for rows of convolutions: wider tiles take more registers than there are.
template <class Body>
void with_narrow_row_engines(const Launch& launch, ScalarType dtype, const Body& body) {
  const auto narrow = [&](auto zero) { body(WarpgroupEngines<decltype(zero), 128>{}); };
  choose_row_engines(launch, dtype, narrow, body);
}

// Calls body(Engines{}) for other rows. `area(columns)`: that tiles of so many columns cover. The
// wider tile reads less for each product, and is taken unless much of it would be empty.
template <class Area, class Body>
void with_row_engines(const Launch& launch, ScalarType dtype, const Area& area, const Body& body) {
  const auto either_width = [&](auto zero) {
    using T = decltype(zero);
    if (10 * area(192) <= 11 * area(128)) {
      body(WarpgroupEngines<T, 192>{});
    } else {
      body(WarpgroupEngines<T, 128>{});
    }
  };
  choose_row_engines(launch, dtype, either_width, body);
}

}  // namespace l2rw::cuda
