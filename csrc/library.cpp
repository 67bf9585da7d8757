// The schema of every operator, under its equation and the shapes of its arguments and results. The
// kernels of both devices, cpu/ and cuda/ops/, register themselves.
//
// Sizes: n and m are the examples of the training and of the clean batch, T and S their positions
// per example; i and o are the sizes of a layer's input and output, d is the size of both where
// they are equal; C and O are the input and output channels of a convolution, *s and *p its input
// and output pixels, *k the extents of its kernel; v is the size of a vocabulary. An asterisk
// stands for one to three spatial dimensions, and in weighted_sum for any number of dimensions.
//
// Values: z is a layer's input (x, where a normalization reads it); g is the gradient of the summed
// losses with respect to the layer's output; V and V_b are the layer's part of the direction
// (`direction` and `direction_bias`); u are the scores and w the weights; G and Gb are the
// gradients of single examples with respect to a layer's weight and bias. What is marked "acc" is
// float64 for float64 arguments and float32 for all others.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(l2rw_ext, m) {
  // Equation (12): u_i = sum_t sum_j sum_s (z_it . z'_js + bias) (g_it . g'_js).
  // z [n, T, i], g [n, T, o], z_clean [m, S, i], g_clean [m, S, o] -> u [n], acc
  m.def(
      "factored_correlation(Tensor z, Tensor g, Tensor z_clean, Tensor g_clean, bool bias) -> "
      "Tensor");

  // The same, summed over layers. The layers share n and m; T, S, i and o may differ.
  // z [n, T, i] each, g [n, T, o], z_clean [m, S, i], g_clean [m, S, o] -> u [n], acc
  m.def(
      "factored_correlations(Tensor[] z, Tensor[] g, Tensor[] z_clean, Tensor[] g_clean, bool[] "
      "bias) -> Tensor");

  // u_i = sum_t g_it . (V z_it + V_b).
  // z [n, T, i], g [n, T, o], direction [o, i], direction_bias [o] -> u [n], acc
  m.def(
      "dense_correlation(Tensor z, Tensor g, Tensor direction, Tensor? direction_bias=None) -> "
      "Tensor");

  // u_i = sum_p g_i[:, p] . (V * z_i + V_b)[:, p].
  // z [n, C, *s], g [n, O, *p], direction [O, C / groups, *k], direction_bias [O] -> u [n], acc
  m.def(
      "conv_correlation(Tensor z, Tensor g, Tensor direction, Tensor? direction_bias, int[] "
      "stride, int[] padding, int[] dilation, int groups) -> Tensor");

  // u_i = sum_t g_it . V[index_it].
  // index [n, T] of int64 or int32, g [n, T, d], direction [v, d] -> u [n], acc
  m.def("embedding_correlation(Tensor index, Tensor g, Tensor direction) -> Tensor");

  // sum_i w_i g_it over the (i, t) with index_it = k, for each row k; only examples with w_i != 0.
  // index [n, T] of int64 or int32, g [n, T, d], weights [n] -> [rows, d], acc
  m.def("embedding_weighted_gradient(Tensor index, Tensor g, Tensor weights, int rows) -> Tensor");

  // G_i = sum_t g_it z_it^T, Gb_i = sum_t g_it, u_i = <V, G_i> + <V_b, Gb_i>.
  // z [n, T, i], g [n, T, o], direction [o, i], direction_bias [o] -> G [n, o, i], dtype of z;
  // Gb [n, o], dtype of z; u [n], acc
  m.def(
      "linear_example_gradients(Tensor z, Tensor g, Tensor? direction=None, "
      "Tensor? direction_bias=None) -> (Tensor, Tensor, Tensor)");

  // The same for a convolution: G_i is the gradient of example i with respect to its kernel.
  // z [n, C, *s], g [n, O, *p], direction [O, C / groups, *k], direction_bias [O] ->
  // G [n, O, C / groups, *k], dtype of z; Gb [n, O], dtype of z; u [n], acc
  m.def(
      "conv_example_gradients(Tensor z, Tensor g, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, int groups, Tensor? direction=None, Tensor? direction_bias=None) -> "
      "(Tensor, Tensor, Tensor)");

  // sum_i w_i G_i and sum_i w_i Gb_i of a linear layer over the examples with w_i != 0. w_i g_i may
  // be rounded to the dtype of g. There may be heads h. With `inputs_first` the first result is
  // [(h,) i, o]; without `bias` the second is [0]; both are acc if `wide`, else of the dtype of z.
  // z [n, T, (h,) i], g [n, T, (h,) o], weights [n] -> [(h,) o, i]; [(h,) o]
  m.def(
      "linear_weighted_gradient(Tensor z, Tensor g, Tensor weights, bool bias, bool inputs_first, "
      "bool wide) -> (Tensor, Tensor)");

  // sum_i w_i G_i and sum_i w_i Gb_i of a convolution, without storing G_i. Without weights, each
  // of them is one.
  // z [n, C, *s], g [n, O, *p], weights [n] -> [O, C / groups, *k], acc; [O], acc
  m.def(
      "conv_weighted_gradient(Tensor z, Tensor g, Tensor? weights, int[] kernel_size, int[] "
      "stride, int[] padding, int[] dilation, int groups) -> (Tensor, Tensor)");

  // With x^ = (x - mean) rstd: G_i = sum_t g_it x^_it, Gb_i = sum_t g_it.
  // x [n, T, d], g [n, T, d], mean and rstd broadcast to [n, T, d] -> G [n, d], acc;
  // Gb [n, d], acc
  m.def(
      "affine_example_gradients(Tensor x, Tensor g, Tensor? mean, Tensor? rstd) -> "
      "(Tensor, Tensor)");

  // The gradient of the input of a group norm, and affine_example_gradients of its scale and shift.
  // g [n, C, *s], x [n, C, *s], mean [n, groups], rstd [n, groups], weight [C] ->
  // gradient of x [n, C, *s], dtype of x; G [n, C], acc; Gb [n, C], acc
  m.def(
      "group_norm_backward(Tensor g, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, int "
      "groups) -> (Tensor, Tensor, Tensor)");

  // The derivative of a batch norm in train mode along (x_tangent, V, V_b). With
  // x^ = (x - mean) rstd and E the mean over examples and positions, it is
  // weight rstd (x_tangent - E x_tangent - x^ E(x^ x_tangent)) + x^ V + V_b.
  // x [n, C, *s], x_tangent [n, C, *s], mean [C], rstd [C], weight [C], direction [C],
  // direction_bias [C] -> [n, C, *s], dtype of x
  m.def(
      "batch_norm_tangent(Tensor x, Tensor? x_tangent, Tensor mean, Tensor rstd, Tensor? weight, "
      "Tensor? direction, Tensor? direction_bias) -> Tensor");

  // The sum of w_i G_i over the examples with w_i != 0.
  // gradients [n, *], weights [n] -> [*], acc
  m.def("weighted_sum(Tensor gradients, Tensor weights) -> Tensor");

  // Equations (8) and (9).
  // u [n] -> w [n], dtype of u
  m.def("normalize_weights(Tensor u) -> Tensor");
}
