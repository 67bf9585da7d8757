#pragma once

// g . (V * z + V_b) for groups of few channels, above all depthwise convolutions. They are too
// narrow for the tiles of a matrix product, and bound by memory.

#include "checks.h"
#include "convolution_sizes.h"
#include "cuda/util/launch.cuh"

namespace l2rw::cuda {

void correlate_narrow(
    const Launch& launch,
    const Convolution& convolution,
    const Tensor& z,                       // [n, C, *s], any strides
    const Tensor& g,                       // [n, O, *p], any strides
    const Tensor& direction,               // [O, C / groups, *k]
    const OptionalTensor& direction_bias,  // [O]
    const Tensor& u);                      // [n], acc

}  // namespace l2rw::cuda
