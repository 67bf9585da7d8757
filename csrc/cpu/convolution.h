#pragma once

// Gradients of single examples of a convolution with respect to its kernel, as matrix products over
// the output pixels. How the products are blocked: docs/kernels.md.

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "checks.h"
#include "convolution_sizes.h"
#include "cpu/isa/kernels.h"

namespace l2rw {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t bytes_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// Pieces of at most `most`, as equal as can be: calls body(first, count).
template <class Body>
void split_evenly(int64_t size, int64_t most, const Body& body) {
  const int64_t pieces = ceil_div(size, most);
  for (int64_t i = 0, first = 0; i < pieces; ++i) {
    const int64_t count = (size - first) / (pieces - i);
    body(first, count);
    first += count;
  }
}

// A tensor (examples, channels, depth, height, width); strides in elements.
struct Image {
  const void* data;
  ScalarType dtype;
  int64_t example;
  int64_t channel;
  Extents space;

  // Where channel `c` of example `i` starts.
  const void* at(int64_t i, int64_t c) const {
    return static_cast<const char*>(data) + bytes_of(dtype) * (i * example + c * channel);
  }
};

// z or g [n, C, *s] as an image; missing spatial dimensions get the stride of what they hold.
Image image_of(const Tensor& tensor);

// The same for a tensor of rows [n, T, C]: its positions are the pixels.
Image image_of_rows(const Tensor& tensor);

// Memory to be fetched into the cache ahead of its use, a piece at a time.
class Fetch {
 public:
  // `channels` channels of example i, if they lie closely; `space`: their extents.
  void add(const Image& image, int64_t i, int64_t channel, int64_t channels, const Extents& space);
  int64_t bytes() const { return bytes_; }
  // At most `bytes` of what is left.
  const char* take(int64_t bytes);

 private:
  struct Range {
    const char* start;
    int64_t bytes;
  };
  std::vector<Range> ranges_;
  int64_t bytes_ = 0;
};

// Zeroed memory that vectors may be loaded from.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(
            static_cast<T*>(
                ::operator new(sizeof(T) * std::max<int64_t>(size, 1), std::align_val_t{64}))) {
    std::fill_n(data_, size, T(0));
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  T* data_;
};

// How one group of one example is multiplied. The product is kept as a matrix of its own layout
// (`matrix_size` numbers); `to_gradient` and `from_gradient` translate from and to (outputs,
// inputs, taps).
template <class T>
class GradientPlan {
 public:
  // `slots`: examples that may be packed at a time.
  GradientPlan(const Convolution& convolution, int64_t slots);

  int64_t input_size() const { return input_.size; }    // numbers of a packed example's input
  int64_t output_size() const { return output_.size; }  // and of its output gradient
  // Numbers to allocate for `slots` packed examples.
  int64_t input_buffer() const { return slots_ * input_.size + kernels_.lanes; }
  int64_t output_buffer() const { return slots_ * output_.size + kernels_.lanes; }
  int64_t matrix_size() const { return matrix_rows_ * matrix_row_; }

  void pack_input(const Image& z, int64_t example, int64_t channel, T* to) const {
    pack(input_, z, example, channel, T(1), to);
  }
  void pack_output(const Image& g, int64_t example, int64_t channel, T scale, T* to) const {
    pack(output_, g, example, channel, scale, to);
  }

  // The sum over `examples` packed examples is stored in `matrix` (added to it if `add`; null: not
  // kept). Returns its product with `direction` [matrix_size], or 0 without one. `soon`: memory to
  // fetch into the cache meanwhile.
  T multiply(
      const T* input,   // [examples * input_size]
      const T* output,  // [examples * output_size]
      int64_t examples,
      T* matrix,
      bool add,
      const T* direction,
      Fetch& soon) const;

  // sums[o] += sum of the packed output gradient over pixels.
  void sum_pixels(const T* output, T* sums) const;

  // Whether the matrix is the gradient as it stands.
  bool matrix_is_gradient() const {
    return form_ == Form::planar ||
           (form_ == Form::by_input && conv_.taps() == 1 && input_.pitch == conv_.inputs);
  }
  void to_gradient(const T* matrix, T* gradient) const;
  void from_gradient(const T* gradient, T* matrix) const;

 private:
  // What lies along a vector: input channels, output channels, or the pixels of a channel.
  enum class Form { by_input, by_output, planar };
  // How an operand is packed.
  struct Operand {
    int64_t channels;
    Extents extents;  // of the image
    Extents padding;
    Extents stride;       // planar: there is a phase for each place within a stride
    Extents padded = {};  // extents of what is packed; planar: of one phase
    int64_t pitch = 0;    // from one pixel to the next; planar: from one channel to the next
    int64_t size = 0;     // numbers of an example
  };
  struct Tiles {
    int64_t first;  // row or column of the matrix, in vectors for columns of channel forms
    int64_t count;
    int64_t offset[kMaxVectors];  // where the operands start
  };

  void choose_form();
  void lay_out_channels();
  void lay_out_planes();
  int64_t taps_in_run() const;  // taps of a kernel row that lie side by side in the packed input
  int64_t tap_offset(int64_t tap) const;
  void pack(
      const Operand& operand, const Image& image, int64_t example, int64_t channel, T scale, T* to)
      const;
  template <class Body>
  void for_each_block(const Body& body) const;
  T multiply_planes(const T* input, const T* output, T* matrix, bool add, const T* direction) const;

  Convolution conv_;
  const Kernels<T>& kernels_;
  int64_t slots_;
  Form form_;
  Operand input_;
  Operand output_;
  int64_t matrix_rows_;
  int64_t matrix_row_;
  int64_t plane_length_;
  std::vector<Tiles> rows_;
  std::vector<Tiles> columns_;
  // Row starts of the packed examples, and their common width and steps.
  std::vector<int64_t> row_starts_a_;
  std::vector<int64_t> row_starts_b_;
  int64_t row_width_;
  int64_t rows_per_example_;
  int64_t step_a_;
  int64_t step_b_;
  int64_t block_pixels_;
};

}  // namespace l2rw
