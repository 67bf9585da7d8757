#pragma once

// The second pass over the partial sums that blocks leave in a workspace. It adds them up in order.

#include <cstdint>
#include <vector>

#include "checks.h"
#include "cuda/util/launch.cuh"

namespace l2rw::cuda {

// Sums of rows that a layer left in a workspace.
struct LayerRowSums {
  int64_t offset;  // where they begin: [parts, n * positions]
  int64_t parts;
  int64_t positions;
};

// u_i, or zero unless `add`, plus the sum over layers, parts and positions of
// workspace[offset + part * n * positions + i * positions + t]. There are at most kMaxLayers
// layers.
void sum_layers(
    const Launch& launch,
    const Tensor& workspace,  // acc
    const std::vector<LayerRowSums>& layers,
    bool add,
    const Tensor& u);  // [n], acc

// Calls form(row_sums) to fill [parts, rows], and forms the scores from it. With one sum for each
// example there is nothing left to add up, and row_sums is u.
template <class Form>
void sum_parts_of_rows(
    const Launch& launch,
    int64_t parts,
    int64_t rows,
    int64_t positions,
    const Tensor& u,  // [rows / positions], acc
    const Form& form) {
  if (parts * positions == 1) {
    form(u);
    return;
  }
  const Tensor row_sums = torch::stable::new_empty(u, {parts, rows});
  form(row_sums);
  sum_layers(launch, row_sums, {{0, parts, positions}}, false, u);
}

// total_j = sum over parts of partial[part][j].
void sum_parts(
    const Launch& launch,
    const Tensor& partial,  // [parts, count], acc
    const Tensor& total);   // [count], acc

// Calls form(partials...) to fill [parts, count] for each total, and adds up the parts. A single
// part is the total.
template <class Form, class... Totals>
void form_in_parts(const Launch& launch, int64_t parts, const Form& form, const Totals&... totals) {
  if (parts == 1) {
    form(totals...);
    return;
  }
  const auto form_and_sum = [&](const auto&... partials) {
    form(partials...);
    (sum_parts(launch, partials, totals), ...);
  };
  form_and_sum(torch::stable::new_empty(totals, {parts, totals.numel()})...);
}

}  // namespace l2rw::cuda
