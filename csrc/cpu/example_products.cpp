#include "cpu/example_products.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/grain.h"

namespace l2rw {
namespace {

using torch::stable::parallel_for;

// Multiply-adds below which a thread is not worth starting.
constexpr double kGrain = 1e5;
// Bytes of packed examples that are multiplied together.
constexpr int64_t kBatchBytes = 256 * 1024;

// Bytes of a unit's gradient that the second-level cache holds beside the examples.
constexpr int64_t kUnitBytes = 512 * 1024;
// Output channels a unit has at least, where a group is divided.
constexpr int64_t kUnitOutputs = 8;

// Examples are shared out among the threads. Where there are fewer of them than threads, or where
// the gradient of a group is larger than a cache, so are equal parts of its output channels.
struct Units {
  Convolution conv;  // of one unit
  int64_t parts;     // of a group
  int64_t count;     // units of an example
  int64_t weights;   // numbers of a unit's gradient

  int64_t input_channel(int64_t unit) const { return unit / parts * conv.inputs; }
  int64_t output_channel(int64_t unit) const { return unit * conv.outputs; }
  int64_t items() const { return conv.examples * count; }
  // Items of one part follow each other, so that its direction stays in the cache; else those of
  // one example, whose memory does.
  int64_t example(int64_t item) const { return parts > 1 ? item % conv.examples : item / count; }
  int64_t unit(int64_t item) const { return parts > 1 ? item / conv.examples : item % count; }
  void fetch(const Image& z, const Image& g, int64_t i, int64_t unit, Fetch& soon) const {
    soon.add(z, i, input_channel(unit), conv.inputs, conv.in);
    soon.add(g, i, output_channel(unit), conv.outputs, conv.out);
  }
  int64_t grain() const {
    const double work = 1.0 * weights * conv.pixels();
    return std::max<int64_t>(1, static_cast<int64_t>(kGrain / std::max(work, 1.0)));
  }
};

template <class T>
Units divide(const Convolution& convolution, int64_t threads) {
  const int64_t weights = convolution.outputs * convolution.inputs * convolution.taps();
  const int64_t items = std::max<int64_t>(convolution.examples * convolution.groups, 1);
  const int64_t wanted =
      std::max<int64_t>(ceil_div(threads, items), weights * sizeof(T) / kUnitBytes);
  int64_t parts = 1;
  for (int64_t more = 2; parts < wanted && convolution.outputs / more >= kUnitOutputs; ++more) {
    if (convolution.outputs % more == 0) {
      parts = more;
    }
  }
  Units units{convolution, parts, convolution.groups * parts, weights / parts};
  units.conv.outputs /= parts;
  return units;
}

// Writes `size` numbers to place `at` of an array of `dtype`.
template <class T>
void write(void* to, ScalarType dtype, int64_t at, const T* values, int64_t size) {
  dispatch_floating(
      dtype, [&](auto zero) { std::copy_n(values, size, static_cast<decltype(zero)*>(to) + at); });
}

}  // namespace

template <class T>
void form_example_products(
    const Convolution& convolution,
    const Image& z,
    const Image& g,
    const ExampleProducts<T>& products) {
  const Units units = divide<T>(convolution, torch::stable::get_num_threads());
  const GradientPlan<T> plan(units.conv, 1);
  const Kernels<T>& kernel = kernels<T>();
  const int64_t outputs = units.conv.outputs;

  Buffer<T> directions(products.direction != nullptr ? units.count * plan.matrix_size() : 0);
  if (products.direction != nullptr) {
    for (int64_t unit = 0; unit < units.count; ++unit) {
      plan.from_gradient(
          products.direction + unit * units.weights, directions.data() + unit * plan.matrix_size());
    }
  }
  const bool keeps = products.gradients != nullptr;
  const bool in_place = keeps && z.dtype == kDtype<T> && plan.matrix_is_gradient();
  Buffer<T> partial_scores(units.items());
  parallel_for(0, units.items(), units.grain(), [&](int64_t begin, int64_t end) {
    Buffer<T> input(plan.input_buffer());
    Buffer<T> output(plan.output_buffer());
    Buffer<T> own_matrix(keeps && !in_place ? plan.matrix_size() : 0);
    Buffer<T> gradient(z.dtype == kDtype<T> ? 0 : units.weights);
    Buffer<T> sums(outputs);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = units.example(item);
      const int64_t unit = units.unit(item);
      const int64_t place = i * units.count + unit;
      plan.pack_input(z, i, units.input_channel(unit), input.data());
      plan.pack_output(g, i, units.output_channel(unit), T(1), output.data());
      Fetch soon;
      if (item + 1 < end) {
        units.fetch(z, g, units.example(item + 1), units.unit(item + 1), soon);
      }
      T* matrix = in_place ? static_cast<T*>(products.gradients) + place * units.weights
                  : keeps  ? own_matrix.data()
                           : nullptr;
      T score = plan.multiply(
          input.data(),
          output.data(),
          1,
          matrix,
          false,
          products.direction == nullptr ? nullptr : directions.data() + unit * plan.matrix_size(),
          soon);
      if (keeps && !in_place) {
        if (z.dtype == kDtype<T>) {
          plan.to_gradient(matrix, static_cast<T*>(products.gradients) + place * units.weights);
        } else {
          plan.to_gradient(matrix, gradient.data());
          write(products.gradients, z.dtype, place * units.weights, gradient.data(), units.weights);
        }
      }
      if (products.direction_bias != nullptr || products.bias_gradients != nullptr) {
        std::fill_n(sums.data(), outputs, T(0));
        plan.sum_pixels(output.data(), sums.data());
        if (products.direction_bias != nullptr) {
          score += kernel.dot(
              sums.data(), products.direction_bias + units.output_channel(unit), outputs);
        }
        if (products.bias_gradients != nullptr) {
          write(products.bias_gradients, z.dtype, place * outputs, sums.data(), outputs);
        }
      }
      partial_scores.data()[place] = score;
    }
  });
  for (int64_t i = 0; i < convolution.examples; ++i) {
    products.scores[i] = kernel.sum(partial_scores.data() + i * units.count, units.count);
  }
}

template <class T>
void form_weighted_sum(
    const Convolution& convolution,
    const Image& z,
    const Image& g,
    const T* weights,
    T* gradient,
    T* bias_gradient) {
  std::vector<int64_t> active;
  for (int64_t i = 0; i < convolution.examples; ++i) {
    if (weights == nullptr || weights[i] != T(0)) {
      active.push_back(i);
    }
  }
  const int64_t count = static_cast<int64_t>(active.size());
  const int64_t threads = torch::stable::get_num_threads();
  Convolution active_convolution = convolution;
  active_convolution.examples = count;
  const Units units = divide<T>(active_convolution, threads);
  // Each share of the examples has sums of its own, and no more shares than keep all threads busy.
  const int64_t wanted =
      units.count >= 4 * threads ? 1 : ceil_div(2 * threads, std::max<int64_t>(units.count, 1));
  const int64_t shares = std::max<int64_t>(std::min({wanted, threads, count}), 1);

  const GradientPlan<T> single(units.conv, 1);
  const int64_t bytes = sizeof(T) * (single.input_size() + single.output_size());
  const int64_t batch =
      std::clamp<int64_t>(kBatchBytes / bytes, 1, std::max<int64_t>(count / shares, 1));
  const GradientPlan<T> plan(units.conv, batch);
  const Kernels<T>& kernel = kernels<T>();
  const int64_t outputs = units.conv.outputs;
  const int64_t matrix = plan.matrix_size();
  Buffer<T> matrices(units.count * shares * matrix);
  Buffer<T> sums(units.count * shares * outputs);
  const int64_t work = units.count * shares;
  const int64_t grain = std::max<int64_t>(units.grain() * shares / std::max<int64_t>(count, 1), 1);
  parallel_for(0, work, grain, [&](int64_t begin, int64_t end) {
    Buffer<T> input(plan.input_buffer());
    Buffer<T> output(plan.output_buffer());
    for (int64_t item = begin; item < end; ++item) {
      const int64_t unit = item / shares;
      const int64_t share = item % shares;
      const int64_t last = (share + 1) * count / shares;
      for (int64_t first = share * count / shares; first < last; first += batch) {
        const int64_t examples = std::min(batch, last - first);
        for (int64_t e = 0; e < examples; ++e) {
          const int64_t i = active[first + e];
          T* packed = output.data() + e * plan.output_size();
          plan.pack_input(z, i, units.input_channel(unit), input.data() + e * plan.input_size());
          plan.pack_output(
              g, i, units.output_channel(unit), weights == nullptr ? T(1) : weights[i], packed);
          plan.sum_pixels(packed, sums.data() + item * outputs);
        }
        Fetch soon;
        for (int64_t e = first + examples; e < std::min(first + examples + batch, last); ++e) {
          units.fetch(z, g, active[e], unit, soon);
        }
        plan.multiply(
            input.data(),
            output.data(),
            examples,
            matrices.data() + item * matrix,
            true,
            nullptr,
            soon);
      }
    }
  });
  parallel_for(0, units.count, grain_of(shares * matrix), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      T* total = matrices.data() + unit * shares * matrix;
      T* total_sums = sums.data() + unit * shares * outputs;
      for (int64_t share = 1; share < shares; ++share) {
        kernel.column_sums(total + share * matrix, matrix, 1, matrix, total);
        kernel.column_sums(total_sums + share * outputs, outputs, 1, outputs, total_sums);
      }
      plan.to_gradient(total, gradient + unit * units.weights);
      std::copy_n(total_sums, outputs, bias_gradient + unit * outputs);
    }
  });
}

template void form_example_products(
    const Convolution&, const Image&, const Image&, const ExampleProducts<float>&);
template void form_example_products(
    const Convolution&, const Image&, const Image&, const ExampleProducts<double>&);
template void form_weighted_sum(
    const Convolution&, const Image&, const Image&, const float*, float*, float*);
template void form_weighted_sum(
    const Convolution&, const Image&, const Image&, const double*, double*, double*);

}  // namespace l2rw
