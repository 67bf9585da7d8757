#pragma once

// The kernels behind the operators, a shape on every argument.
//
// n, m: examples of the training and the clean batch; T, S: their positions per example; i, o:
// sizes of a layer's input and output; z: a layer's input; g: gradient of the summed losses with
// respect to its output; V, V_b: its part of the direction; u: scores; w: weights; G: gradients of
// single examples. Results marked "acc" are float64 for float64 inputs and float32 for all others.

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace l2rw {

using OptionalTensor = std::optional<torch::stable::Tensor>;
using Sizes = std::vector<int64_t>;
using Tensors = std::vector<torch::stable::Tensor>;  // one for each layer

// Equation (12): u_i = sum_t sum_j sum_s (z_it . z'_js + bias) (g_it . g'_js).
torch::stable::Tensor factored_correlation(  // [n], acc
    const torch::stable::Tensor& z,  // [n, T, i]
    const torch::stable::Tensor& g,  // [n, T, o]
    const torch::stable::Tensor& z_clean,  // [m, S, i]
    const torch::stable::Tensor& g_clean,  // [m, S, o]
    bool bias);

// The same summed over layers, which share n and m.
torch::stable::Tensor factored_correlations(  // [n], acc
    const Tensors& z,                         // [n, T, i] each
    const Tensors& g,                         // [n, T, o]
    const Tensors& z_clean,                   // [m, S, i]
    const Tensors& g_clean,                   // [m, S, o]
    const std::vector<bool>& bias);

// u_i = sum_t g_it . (V z_it + V_b).
torch::stable::Tensor dense_correlation(  // [n], acc
    const torch::stable::Tensor& z,  // [n, T, i]
    const torch::stable::Tensor& g,  // [n, T, o]
    const torch::stable::Tensor& direction,  // [o, i]
    const OptionalTensor& direction_bias);  // [o]

// u_i = sum_p g_i[:, p] . (V * z_i + V_b)[:, p], one to three spatial dimensions.
torch::stable::Tensor conv_correlation(  // [n], acc
    const torch::stable::Tensor& z,  // [n, C, *s]
    const torch::stable::Tensor& g,  // [n, O, *p]
    const torch::stable::Tensor& direction,  // [O, C / groups, *k]
    const OptionalTensor& direction_bias,  // [O]
    const Sizes& stride,
    const Sizes& padding,
    const Sizes& dilation,
    int64_t groups);

// x^ = (x - mean) rstd; u_i = sum_t sum_c g_itc (x^_itc V_c + V_bc).
torch::stable::Tensor affine_correlation(  // [n], acc
    const torch::stable::Tensor& x,  // [n, T, d]
    const torch::stable::Tensor& g,  // [n, T, d]
    const OptionalTensor& mean,  // broadcasts to [n, T, d]
    const OptionalTensor& rstd,  // broadcasts to [n, T, d]
    const OptionalTensor& direction,  // [d]
    const OptionalTensor& direction_bias);  // [d]

// u_i = sum_t g_it . V[index_it].
torch::stable::Tensor embedding_correlation(  // [n], acc
    const torch::stable::Tensor& index,  // [n, T], int64 or int32
    const torch::stable::Tensor& g,  // [n, T, d]
    const torch::stable::Tensor& direction);  // [v, d]

// G_i = sum_t g_it z_it^T, Gb_i = sum_t g_it, u_i = <V, G_i> + <V_b, Gb_i>.
std::tuple<
    torch::stable::Tensor,  // G [n, o, i], dtype of z
    torch::stable::Tensor,  // Gb [n, o], dtype of z
    torch::stable::Tensor>  // u [n], acc
linear_example_gradients(
    const torch::stable::Tensor& z,         // [n, T, i]
    const torch::stable::Tensor& g,         // [n, T, o]
    const OptionalTensor& direction,        // [o, i]
    const OptionalTensor& direction_bias);  // [o]

std::tuple<
    torch::stable::Tensor,  // G [n, O, C / groups, *k], dtype of z
    torch::stable::Tensor,  // Gb [n, O], dtype of z
    torch::stable::Tensor>  // u [n], acc
conv_example_gradients(
    const torch::stable::Tensor& z,  // [n, C, *s]
    const torch::stable::Tensor& g,  // [n, O, *p]
    const Sizes& kernel_size,
    const Sizes& stride,
    const Sizes& padding,
    const Sizes& dilation,
    int64_t groups,
    const OptionalTensor& direction,        // [O, C / groups, *k]
    const OptionalTensor& direction_bias);  // [O]

// sum_i w_i G_i of a convolution, without storing G_i.
std::tuple<
    torch::stable::Tensor,  // [O, C / groups, *k], acc
    torch::stable::Tensor>  // [O], acc
conv_weighted_gradient(
    const torch::stable::Tensor& z,  // [n, C, *s]
    const torch::stable::Tensor& g,  // [n, O, *p]
    const OptionalTensor& weights,   // [n]
    const Sizes& kernel_size,
    const Sizes& stride,
    const Sizes& padding,
    const Sizes& dilation,
    int64_t groups);

// G_i = sum_t g_it x^_it, Gb_i = sum_t g_it.
std::tuple<
    torch::stable::Tensor,  // G [n, d], acc
    torch::stable::Tensor>  // Gb [n, d], acc
affine_example_gradients(
    const torch::stable::Tensor& x,  // [n, T, d]
    const torch::stable::Tensor& g,  // [n, T, d]
    const OptionalTensor& mean,      // broadcasts to [n, T, d]
    const OptionalTensor& rstd);     // broadcasts to [n, T, d]

// The gradient of the input of a group norm, and affine_example_gradients of its scale and shift.
std::tuple<
    torch::stable::Tensor,  // gradient of x [n, C, *s], dtype of x
    torch::stable::Tensor,  // G [n, C], acc
    torch::stable::Tensor>  // Gb [n, C], acc
group_norm_backward(
    const torch::stable::Tensor& g,     // [n, C, *s]
    const torch::stable::Tensor& x,     // [n, C, *s]
    const torch::stable::Tensor& mean,  // [n, groups]
    const torch::stable::Tensor& rstd,  // [n, groups]
    const OptionalTensor& weight,       // [C]
    int64_t groups);

// The derivative of a batch norm in train mode along (x_tangent, V, V_b). With x^ = (x - mean) rstd
// and E over examples and positions: weight rstd (x_tangent - E x_tangent - x^ E(x^ x_tangent)) +
// x^ V + V_b.
torch::stable::Tensor batch_norm_tangent(  // [n, C, *s], dtype of x
    const torch::stable::Tensor& x,         // [n, C, *s]
    const OptionalTensor& x_tangent,        // [n, C, *s]
    const torch::stable::Tensor& mean,      // [C]
    const torch::stable::Tensor& rstd,      // [C]
    const OptionalTensor& weight,           // [C]
    const OptionalTensor& direction,        // [C]
    const OptionalTensor& direction_bias);  // [C]

// sum of w_i G_i over the examples with w_i != 0.
torch::stable::Tensor weighted_sum(  // [*], acc
    const torch::stable::Tensor& gradients,  // [n, *]
    const torch::stable::Tensor& weights);  // [n]

// w_a g_a for a in active.
torch::stable::Tensor scale_rows(  // [k, T, d], dtype of g
    const torch::stable::Tensor& g,  // [n, T, d]
    const torch::stable::Tensor& weights,  // [n]
    const torch::stable::Tensor& active);  // [k], int64

// Equations (8) and (9).
torch::stable::Tensor normalize_weights(  // [n], dtype of u
    const torch::stable::Tensor& u);  // [n]

}  // namespace l2rw
