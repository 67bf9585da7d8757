#pragma once

// Which mma and which tiles multiply which dtype on which device.

#include "checks.h"
#include "cuda/gemm/heuristics.h"
#include "cuda/gemm/mma.cuh"
#include "cuda/gemm/mma_sm90.cuh"
#include "cuda/gemm/tile.h"
#include "cuda/util/launch.cuh"

namespace l2rw::cuda {

// Tiles for tensor cores: one that multiplies fastest, one for products of few rows or columns, and
// one for as few columns as small convolutions have channels.
template <class T>
struct TensorCoreConfig {
  using Large = TensorCoreMma<T, TensorCoreTile<128, 128, 64, 32>, 1>;
  using Small = TensorCoreMma<T, TensorCoreTile<64, 64, 32, 32>, 3>;
  using Narrow = TensorCoreMma<T, TensorCoreTile<128, 32, 32, 32>, 3>;
};

template <class T, int Columns>
struct Sm90Config : TensorCoreConfig<T> {
  using Large = Sm90Mma<T, Columns>;
};

template <class T>
struct SimtConfig {
  using Large = SimtMma<T, SimtTile<64, 128>>;
  using Small = Large;
  using Narrow = SimtMma<T, SimtTile<128, 32>>;
};

// Calls run(Mma{}) with the tile of a plan.
template <class Config, class Run>
void with_tile(const GemmPlan& plan, const Run& run) {
  switch (plan.tile) {
    case TileKind::large:
      return run(typename Config::Large{});
    case TileKind::small:
      return run(typename Config::Small{});
    case TileKind::narrow:
      return run(typename Config::Narrow{});
  }
}

// Calls body(Config{}) with what every architecture has for a floating dtype.
template <class Body>
void with_config(const Launch& launch, ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(SimtConfig<double>{});
    case ScalarType::BFloat16:
      return body(TensorCoreConfig<__nv_bfloat16>{});
    case ScalarType::Half:
      return body(TensorCoreConfig<__half>{});
    default:
      if (launch.tf32_allowed()) {
        return body(TensorCoreConfig<float>{});
      }
      return body(SimtConfig<float>{});
  }
}

// The same for products of rows, whose large tiles of 16-bit numbers some devices multiply with
// wgmma. There `with_wgmma(T{})` is called instead.
template <class WithWgmma, class Body>
void with_config_or_wgmma(
    const Launch& launch, ScalarType dtype, const WithWgmma& with_wgmma, const Body& body) {
  if (launch.warpgroups() && dtype == ScalarType::BFloat16) {
    with_wgmma(__nv_bfloat16{});
  } else if (launch.warpgroups() && dtype == ScalarType::Half) {
    with_wgmma(__half{});
  } else {
    with_config(launch, dtype, body);
  }
}

// Calls body(Config{}) for the rows of convolutions, for which a wider tile would need more
// registers than there are.
template <class Body>
void with_conv_config(const Launch& launch, ScalarType dtype, const Body& body) {
  const auto narrower = [&](auto zero) { body(Sm90Config<decltype(zero), 128>{}); };
  with_config_or_wgmma(launch, dtype, narrower, body);
}

// Calls body(Config{}) for the rows of linear layers. `area(columns)` is the area that tiles of so
// many columns cover: the wider tile reads less for each product, and is taken unless much of it
// would be empty.
template <class Area, class Body>
void with_linear_config(
    const Launch& launch, ScalarType dtype, const Area& area, const Body& body) {
  const auto either_width = [&](auto zero) {
    using T = decltype(zero);
    if (10 * area(192) <= 11 * area(128)) {
      body(Sm90Config<T, 192>{});
    } else {
      body(Sm90Config<T, 128>{});
    }
  };
  with_config_or_wgmma(launch, dtype, either_width, body);
}

}  // namespace l2rw::cuda
