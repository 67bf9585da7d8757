// Every operator schema. Shapes and equations: correlation.h. Kernels: cpu/ and cuda/, which
// register themselves.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(l2rw_ext, m) {
  m.def(
      "factored_correlation(Tensor z, Tensor g, Tensor z_clean, Tensor g_clean, bool bias) -> "
      "Tensor");
  m.def(
      "factored_correlations(Tensor[] z, Tensor[] g, Tensor[] z_clean, Tensor[] g_clean, bool[] "
      "bias) -> Tensor");
  m.def(
      "dense_correlation(Tensor z, Tensor g, Tensor direction, Tensor? direction_bias=None) -> "
      "Tensor");
  m.def(
      "conv_correlation(Tensor z, Tensor g, Tensor direction, Tensor? direction_bias, int[] "
      "stride, "
      "int[] padding, int[] dilation, int groups) -> Tensor");
  m.def(
      "affine_correlation(Tensor x, Tensor g, Tensor? mean, Tensor? rstd, Tensor? direction, "
      "Tensor? direction_bias) -> Tensor");
  m.def("embedding_correlation(Tensor index, Tensor g, Tensor direction) -> Tensor");
  m.def(
      "linear_example_gradients(Tensor z, Tensor g, Tensor? direction=None, "
      "Tensor? direction_bias=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "conv_example_gradients(Tensor z, Tensor g, int[] kernel_size, int[] stride, int[] padding, "
      "int[] dilation, int groups, Tensor? direction=None, Tensor? direction_bias=None) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "conv_weighted_gradient(Tensor z, Tensor g, Tensor? weights, int[] kernel_size, int[] "
      "stride, "
      "int[] padding, int[] dilation, int groups) -> (Tensor, Tensor)");
  m.def(
      "affine_example_gradients(Tensor x, Tensor g, Tensor? mean, Tensor? rstd) -> "
      "(Tensor, Tensor)");
  m.def(
      "group_norm_backward(Tensor g, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, int "
      "groups) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_tangent(Tensor x, Tensor? x_tangent, Tensor mean, Tensor rstd, Tensor? weight, "
      "Tensor? direction, Tensor? direction_bias) -> Tensor");
  m.def("weighted_sum(Tensor gradients, Tensor weights) -> Tensor");
  m.def("scale_rows(Tensor g, Tensor weights, Tensor active) -> Tensor");
  m.def("normalize_weights(Tensor u) -> Tensor");
}
