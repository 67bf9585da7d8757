#pragma once

// The ordered second pass over sums that blocks left in a workspace.

#include <vector>

#include "cuda/launch.cuh"

namespace l2rw::cuda {

// Sums of single rows that a layer left in a workspace.
struct RowSums {
  int64_t offset;  // where they begin: [groups, n * positions]
  int64_t groups;
  int64_t positions;
};

// u_i, or zero unless `add`, plus the sum over layers, groups and positions of
// workspace[offset + group * n * positions + i * positions + t]. At most kMostLayers layers.
void sum_layers(
    const Launch& launch,
    const Tensor& workspace,  // acc
    const std::vector<RowSums>& layers,
    bool add,
    const Tensor& u);  // [n], acc

// u_i = sum over groups and positions of partial[group][i * positions + t].
void sum_positions(
    const Launch& launch,
    const Tensor& partial,  // [groups, n * positions], acc
    int64_t positions,
    const Tensor& u);  // [n], acc

// Calls form(row_sums) to fill [groups, rows], and forms the scores from it. With one sum for each
// example nothing is left to add up, and row_sums is u.
template <class Form>
void sum_rows(
    const Launch& launch,
    int64_t groups,
    int64_t rows,
    int64_t positions,
    const Tensor& u,  // [rows / positions], acc
    const Form& form) {
  if (groups * positions == 1) {
    form(u);
    return;
  }
  const Tensor row_sums = torch::stable::new_empty(u, {groups, rows});
  form(row_sums);
  sum_positions(launch, row_sums, positions, u);
}

// total_j = sum over parts of partial[part][j].
void sum_parts(
    const Launch& launch,
    const Tensor& partial,  // [parts, count], acc
    const Tensor& total);   // [count], acc

}  // namespace l2rw::cuda
