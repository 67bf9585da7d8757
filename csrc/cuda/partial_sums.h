#pragma once

// The ordered second pass over sums that blocks left in a workspace.

#include "cuda/launch.cuh"

namespace l2rw::cuda {

// u_i = sum over groups and positions of partial[group][i * positions + t].
void sum_positions(
    const Launch& launch,
    const Tensor& partial,  // [groups, n * positions], acc
    int64_t positions,
    const Tensor& u);  // [n], acc

// total_j = sum over parts of partial[part][j].
void sum_parts(
    const Launch& launch,
    const Tensor& partial,  // [parts, count], acc
    const Tensor& total);   // [count], acc

}  // namespace l2rw::cuda
