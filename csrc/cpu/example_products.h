#pragma once

// What the operators make of the gradients of single examples: the gradients themselves, their
// product with a direction, their weighted sum. Shared by convolutions and (as convolutions of
// width T with a kernel of one) linear layers.

#include "cpu/convolution.h"

namespace l2rw {

// Any pointer but the scores may be null: that part is then not formed, or counts as zero.
template <class T>
struct ExampleProducts {
  const T* direction;       // [O, C / groups, taps]
  const T* direction_bias;  // [O]
  T* scores;                // [n], u_i = <V, G_i> + <V_b, Gb_i>
  void* gradients;          // [n, O, C / groups, taps], dtype of z
  void* bias_gradients;     // [n, O], dtype of z
};

template <class T>
void form_example_products(
    const Convolution& convolution,
    const Image& z,
    const Image& g,
    const ExampleProducts<T>& products);

// sum_i w_i G_i and sum_i w_i Gb_i; examples with w_i = 0 are never read. No weights: all ones.
template <class T>
void form_weighted_sum(
    const Convolution& convolution,
    const Image& z,
    const Image& g,
    const T* weights,   // [n] or null
    T* gradient,        // [O, C / groups, taps]
    T* bias_gradient);  // [O]

}  // namespace l2rw
