#include "cpu/convolution.h"

#include <algorithm>

namespace l2rw {
namespace {

// Bytes of packed input and output gradient that all tiles pass over before the next ones: what the
// second-level cache holds beside the matrix.
constexpr int64_t kBlockBytes = 96 * 1024;
// Vectors in a tile of a channel form. Three leave registers for enough rows.
constexpr int64_t kChannelVectors = 3;
// What kBlockBytes is for channels, in numbers of one plane.
constexpr int64_t kPlaneBlock = 1024;
// In the channel forms, the most pixels that one number of the matrix is summed over before the sum
// is added to others: the rounding of equal terms has one sign, and grows with the length of a sum.
// In the planar form the lanes of a vector divide kPlaneBlock numbers among them.
constexpr int64_t kLongestSum = 256;

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t kCacheLine = 64;

// The largest of the pieces of split_evenly, or 1.
int64_t widest_piece(int64_t size, int64_t most) {
  return size == 0 ? 1 : ceil_div(size, ceil_div(size, most));
}

// Loads a tile of rows x vectors needs for one product, at least one: a load costs what a product
// does.
double loads_per_product(int64_t rows, int64_t vectors, double cost_of_vector) {
  return std::max(
      1.0, (static_cast<double>(rows) + cost_of_vector * vectors) / (1.0 * rows * vectors));
}

}  // namespace

Image image_of(const Tensor& tensor) {
  const int64_t dims = tensor.dim() - 2;
  Image image{
      tensor.data_ptr(), tensor.scalar_type(), tensor.stride(0), tensor.stride(1), {0, 0, 0}};
  for (int64_t d = 0; d < dims; ++d) {
    image.space[3 - dims + d] = tensor.stride(2 + d);
  }
  // A dimension of size one may have any stride: give it the one that lets rows follow each other.
  for (int64_t d = 1; d >= 0; --d) {
    const int64_t at = d - (3 - dims);
    if (at < 0 || tensor.size(2 + at) == 1) {
      const int64_t inner = d + 1 - (3 - dims);
      image.space[d] = image.space[d + 1] * tensor.size(2 + inner);
    }
  }
  return image;
}

Image image_of_rows(const Tensor& tensor) {
  Image image = image_of(tensor);
  std::swap(image.channel, image.space[2]);
  image.space[0] = image.space[1] = tensor.size(1) * image.space[2];
  return image;
}

void Fetch::add(
    const Image& image, int64_t i, int64_t channel, int64_t channels, const Extents& space) {
  int64_t last = (channels - 1) * image.channel;
  int64_t numbers = channels;
  for (int d = 0; d < 3; ++d) {
    last += (space[d] - 1) * image.space[d];
    numbers *= space[d];
  }
  if (last < 2 * numbers) {
    ranges_.push_back(
        {static_cast<const char*>(image.at(i, channel)), (last + 1) * bytes_of(image.dtype)});
    bytes_ += ranges_.back().bytes;
  }
}

const char* Fetch::take(int64_t bytes) {
  if (ranges_.empty()) {
    return nullptr;
  }
  Range& range = ranges_.back();
  const char* start = range.start;
  range.start += bytes;
  range.bytes -= bytes;
  if (range.bytes <= 0) {
    ranges_.pop_back();
  }
  return start;
}

template <class T>
GradientPlan<T>::GradientPlan(const Convolution& convolution, int64_t slots)
    : conv_(convolution),
      kernels_(kernels<T>()),
      slots_(slots),
      input_{conv_.inputs, conv_.in, conv_.padding, conv_.stride},
      output_{conv_.outputs, conv_.out, {0, 0, 0}, {1, 1, 1}} {
  choose_form();
  if (form_ == Form::planar) {
    lay_out_planes();
  } else {
    lay_out_channels();
  }
}

template <class T>
void GradientPlan<T>::choose_form() {
  const int64_t lanes = kernels_.lanes;
  const double products = 1.0 * conv_.taps() * conv_.pixels();
  // `run` of the `broadcast` channels and taps lie side by side.
  const auto channel_cost = [&](int64_t broadcast, int64_t run, int64_t wide, int64_t columns) {
    const int64_t v = widest_piece(columns, kChannelVectors);
    const int64_t r = std::min(run, kernels_.max_rows[v]);
    return products * broadcast * ceil_div(wide, lanes) * loads_per_product(r, v, 1.0);
  };
  const double by_input = channel_cost(
      conv_.outputs, conv_.outputs, conv_.inputs, conv_.taps() * ceil_div(conv_.inputs, lanes));
  const double by_output = channel_cost(
      conv_.inputs, conv_.inputs * taps_in_run(), conv_.outputs, ceil_div(conv_.outputs, lanes));
  // Vectors of planes start anywhere, and most then lie in two cache lines.
  int64_t length = 1;
  for (int d = 0; d < 3; ++d) {
    const int64_t extent = ceil_div(conv_.in[d] + 2 * conv_.padding[d], conv_.stride[d]);
    length *= d == 0 ? conv_.out[d] : extent;
  }
  const int64_t planar_columns = widest_piece(conv_.inputs * conv_.taps(), kMaxVectors);
  const double planar = 1.0 * conv_.outputs * conv_.inputs * conv_.taps() *
                        (ceil_div(length, lanes) *
                             loads_per_product(
                                 std::min(conv_.outputs, kernels_.max_planar_rows[planar_columns]),
                                 planar_columns,
                                 2.0) +
                         6);
  form_ = by_input <= by_output && by_input <= planar ? Form::by_input
          : by_output <= planar                       ? Form::by_output
                                                      : Form::planar;
}

template <class T>
int64_t GradientPlan<T>::taps_in_run() const {
  return conv_.dilation[2] == 1 ? conv_.kernel[2] : 1;
}

template <class T>
int64_t GradientPlan<T>::tap_offset(int64_t tap) const {
  const int64_t at[3] = {
      tap / (conv_.kernel[1] * conv_.kernel[2]),
      tap / conv_.kernel[2] % conv_.kernel[1],
      tap % conv_.kernel[2]};
  int64_t pixel = 0;
  int64_t phase = 0;
  for (int d = 0; d < 3; ++d) {
    const int64_t shift = at[d] * conv_.dilation[d];
    const int64_t phases = form_ == Form::planar ? conv_.stride[d] : 1;
    pixel = pixel * input_.padded[d] + shift / phases;
    phase = phase * phases + shift % phases;
  }
  return phase * input_.padded[0] * input_.padded[1] * input_.padded[2] + pixel;
}

template <class T>
void GradientPlan<T>::lay_out_channels() {
  const int64_t lanes = kernels_.lanes;
  const int64_t taps = conv_.taps();
  const bool by_input = form_ == Form::by_input;
  for (int d = 0; d < 3; ++d) {
    input_.padded[d] = conv_.in[d] + 2 * conv_.padding[d];
  }
  output_.padded = conv_.out;
  input_.pitch = by_input ? round_up(conv_.inputs, lanes) : conv_.inputs;
  output_.pitch = by_input ? conv_.outputs : round_up(conv_.outputs, lanes);
  input_.size =
      round_up(input_.padded[0] * input_.padded[1] * input_.padded[2] * input_.pitch, lanes);
  output_.size = round_up(conv_.pixels() * output_.pitch, lanes);
  matrix_rows_ = by_input ? conv_.outputs : taps * conv_.inputs;
  matrix_row_ = by_input ? taps * input_.pitch : output_.pitch;

  // Columns: all vectors of the matrix, by their start in the packed b side.
  const int64_t vectors = matrix_row_ / lanes;
  split_evenly(vectors, kChannelVectors, [&](int64_t first, int64_t count) {
    Tiles tile{first, count, {}};
    for (int64_t v = 0; v < count; ++v) {
      const int64_t column = (first + v) * lanes;
      tile.offset[v] =
          by_input ? tap_offset(column / input_.pitch) * input_.pitch + column % input_.pitch
                   : column;
    }
    columns_.push_back(tile);
  });
  // Rows: runs of numbers that lie side by side in the packed a side. By output, these are the
  // channels of the taps of one kernel row.
  const int64_t most = kernels_.max_rows[widest_piece(vectors, kChannelVectors)];
  const int64_t run = by_input ? conv_.outputs : taps_in_run() * conv_.inputs;
  for (int64_t start = 0; start < matrix_rows_; start += run) {
    const int64_t offset = by_input ? 0 : tap_offset(start / conv_.inputs) * input_.pitch;
    split_evenly(run, most, [&](int64_t first, int64_t count) {
      rows_.push_back({start + first, count, {offset + first}});
    });
  }

  // Pixels: rows of the output, one after the other where both sides allow it.
  const int64_t input_step = conv_.stride[2] * input_.pitch;
  const auto input_pixel = [&](int64_t d, int64_t h) {
    return ((d * conv_.stride[0] * input_.padded[1] + h * conv_.stride[1]) * input_.padded[2]) *
           input_.pitch;
  };
  const int64_t image_rows = conv_.out[0] * conv_.out[1];
  bool seamless = true;
  for (int64_t row = 0; row < image_rows; ++row) {
    seamless = seamless && input_pixel(row / conv_.out[1], row % conv_.out[1]) ==
                               row * conv_.out[2] * input_step;
  }
  rows_per_example_ = seamless ? 1 : image_rows;
  row_width_ = conv_.pixels() / rows_per_example_;
  step_a_ = by_input ? output_.pitch : input_step;
  step_b_ = by_input ? input_step : output_.pitch;
  for (int64_t e = 0; e < slots_; ++e) {
    for (int64_t row = 0; row < rows_per_example_; ++row) {
      const int64_t in =
          e * input_.size + (seamless ? 0 : input_pixel(row / conv_.out[1], row % conv_.out[1]));
      const int64_t out = e * output_.size + row * row_width_ * output_.pitch;
      row_starts_a_.push_back(by_input ? out : in);
      row_starts_b_.push_back(by_input ? in : out);
    }
  }
  const int64_t bytes =
      sizeof(T) * (output_.pitch + conv_.stride[1] * conv_.stride[2] * input_.pitch);
  block_pixels_ = std::clamp<int64_t>(kBlockBytes / bytes, 16, kLongestSum);
}

template <class T>
void GradientPlan<T>::lay_out_planes() {
  const int64_t lanes = kernels_.lanes;
  int64_t phases = 1;
  for (int d = 0; d < 3; ++d) {
    input_.padded[d] = ceil_div(conv_.in[d] + 2 * conv_.padding[d], conv_.stride[d]);
    phases *= conv_.stride[d];
  }
  plane_length_ = round_up(
      ((conv_.out[0] - 1) * input_.padded[1] + conv_.out[1] - 1) * input_.padded[2] + conv_.out[2],
      lanes);
  input_.pitch = phases * input_.padded[0] * input_.padded[1] * input_.padded[2];
  output_.pitch = plane_length_;
  input_.size = round_up(conv_.inputs * input_.pitch + lanes, lanes);
  output_.size = conv_.outputs * output_.pitch;
  output_.padded = input_.padded;
  matrix_rows_ = conv_.outputs;
  matrix_row_ = conv_.inputs * conv_.taps();
  split_evenly(matrix_row_, kMaxVectors, [&](int64_t first, int64_t count) {
    Tiles tile{first, count, {}};
    for (int64_t v = 0; v < count; ++v) {
      tile.offset[v] =
          (first + v) / conv_.taps() * input_.pitch + tap_offset((first + v) % conv_.taps());
    }
    columns_.push_back(tile);
  });
  const int64_t most = kernels_.max_planar_rows[widest_piece(matrix_row_, kMaxVectors)];
  split_evenly(matrix_rows_, most, [&](int64_t first, int64_t count) {
    rows_.push_back({first, count, {first * output_.pitch}});
  });
}

template <class T>
void GradientPlan<T>::pack(
    const Operand& operand, const Image& image, int64_t example, int64_t channel, T scale, T* to)
    const {
  const auto& [channels, extents, padding, stride, padded, pitch, size] = operand;
  const Extents& space = image.space;
  const int64_t element = bytes_of(image.dtype);
  const char* from = static_cast<const char*>(image.at(example, channel));
  if (form_ != Form::planar) {
    const bool seamless = padded[1] == extents[1] && padded[2] == extents[2] &&
                          space[1] == extents[2] * space[2] && space[0] == extents[1] * space[1];
    const int64_t width = seamless ? extents[0] * extents[1] * extents[2] : extents[2];
    for (int64_t d = 0; d < (seamless ? 1 : extents[0]); ++d) {
      for (int64_t h = 0; h < (seamless ? 1 : extents[1]); ++h) {
        const int64_t pixel =
            ((d + padding[0]) * padded[1] + h + padding[1]) * padded[2] + padding[2];
        kernels_.transpose(
            to + pixel * pitch,
            pitch,
            from + element * (d * space[0] + h * space[1]),
            image.dtype,
            image.channel,
            space[2],
            channels,
            width,
            scale);
      }
    }
    return;
  }
  // Place p of the padded image is place p / stride of phase p % stride.
  const int64_t phase_size = padded[0] * padded[1] * padded[2];
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t d = 0; d < extents[0]; ++d) {
      for (int64_t h = 0; h < std::min(stride[1], extents[1]); ++h) {
        for (int64_t w = 0; w < std::min(stride[2], extents[2]); ++w) {
          const int64_t at[3] = {d + padding[0], h + padding[1], w + padding[2]};
          const int64_t phase =
              (at[0] % stride[0] * stride[1] + at[1] % stride[1]) * stride[2] + at[2] % stride[2];
          const int64_t place =
              (at[0] / stride[0] * padded[1] + at[1] / stride[1]) * padded[2] + at[2] / stride[2];
          kernels_.transpose(
              to + c * pitch + phase * phase_size + place,
              padded[2],
              from + element * (c * image.channel + d * space[0] + h * space[1] + w * space[2]),
              image.dtype,
              stride[2] * space[2],
              stride[1] * space[1],
              ceil_div(extents[2] - w, stride[2]),
              ceil_div(extents[1] - h, stride[1]),
              scale);
        }
      }
    }
  }
}

template <class T>
T GradientPlan<T>::multiply(
    const T* input,
    const T* output,
    int64_t examples,
    T* matrix,
    bool add,
    const T* direction,
    Fetch& soon) const {
  T score = 0;
  if (form_ == Form::planar) {
    for (int64_t e = 0; e < examples; ++e) {
      score += multiply_planes(
          input + e * input_.size, output + e * output_.size, matrix, add || e > 0, direction);
    }
    return score;
  }
  const T* a = form_ == Form::by_input ? output : input;
  const T* b = form_ == Form::by_input ? input : output;
  const int64_t rows = examples * rows_per_example_;
  const bool narrow = row_width_ <= block_pixels_;
  const int64_t passes = rows * (narrow ? 1 : ceil_div(row_width_, block_pixels_));
  const int64_t tiles = static_cast<int64_t>(rows_.size() * columns_.size());
  const int64_t soon_bytes =
      round_up(ceil_div(soon.bytes(), std::max<int64_t>(passes * tiles, 1)), kCacheLine);
  // One block of `count` rows of `width` pixels, all tiles.
  const auto pass = [&](int64_t row, int64_t count, int64_t skip, int64_t width) {
    PixelRows<T> pixels{
        row_starts_a_.data() + row,
        row_starts_b_.data() + row,
        count,
        width,
        step_a_,
        step_b_,
        nullptr,
        0};
    for (const Tiles& tile_rows : rows_) {
      for (const Tiles& tile_columns : columns_) {
        const T* vectors[kMaxVectors];
        for (int64_t v = 0; v < tile_columns.count; ++v) {
          vectors[v] = b + tile_columns.offset[v] + skip * step_b_;
        }
        const int64_t at = tile_rows.first * matrix_row_ + tile_columns.first * kernels_.lanes;
        pixels.soon = soon.take(count * soon_bytes);
        pixels.soon_bytes = pixels.soon == nullptr ? 0 : soon_bytes;
        score += kernels_.channel_tile[tile_columns.count][tile_rows.count](
            a + tile_rows.offset[0] + skip * step_a_,
            vectors,
            pixels,
            {matrix == nullptr ? nullptr : matrix + at,
             direction == nullptr ? nullptr : direction + at,
             matrix_row_,
             add});
      }
    }
    add = true;
  };
  if (narrow) {
    const int64_t most = std::max<int64_t>(block_pixels_ / row_width_, 1);
    split_evenly(
        rows, most, [&](int64_t first, int64_t count) { pass(first, count, 0, row_width_); });
  } else {
    for (int64_t row = 0; row < rows; ++row) {
      split_evenly(row_width_, block_pixels_, [&](int64_t first, int64_t count) {
        pass(row, 1, first, count);
      });
    }
  }
  return score;
}

template <class T>
T GradientPlan<T>::multiply_planes(
    const T* input, const T* output, T* matrix, bool add, const T* direction) const {
  T score = 0;
  for (int64_t start = 0; start < plane_length_; start += kPlaneBlock) {
    const int64_t length = std::min(kPlaneBlock, plane_length_ - start);
    for (const Tiles& tile_rows : rows_) {
      for (const Tiles& tile_columns : columns_) {
        const T* vectors[kMaxVectors];
        for (int64_t v = 0; v < tile_columns.count; ++v) {
          vectors[v] = input + tile_columns.offset[v] + start;
        }
        const int64_t at = tile_rows.first * matrix_row_ + tile_columns.first;
        score += kernels_.planar_tile[tile_columns.count][tile_rows.count](
            output + tile_rows.offset[0] + start,
            output_.pitch,
            vectors,
            length,
            {matrix == nullptr ? nullptr : matrix + at,
             direction == nullptr ? nullptr : direction + at,
             matrix_row_,
             add || start > 0});
      }
    }
  }
  return score;
}

template <class T>
void GradientPlan<T>::sum_pixels(const T* output, T* sums) const {
  if (form_ != Form::planar) {
    kernels_.column_sums(output, output_.pitch, conv_.pixels(), conv_.outputs, sums);
    return;
  }
  for (int64_t o = 0; o < conv_.outputs; ++o) {
    sums[o] += kernels_.sum(output + o * output_.pitch, plane_length_);
  }
}

// Calls body(start, pitch, start in the gradient, pitch there, size) for blocks of the matrix with
// `size` channels of every tap: the channels are contiguous in the matrix, the taps in the
// gradient.
template <class T>
template <class Body>
void GradientPlan<T>::for_each_block(const Body& body) const {
  const int64_t taps = conv_.taps();
  const int64_t row = conv_.inputs * taps;
  if (form_ == Form::by_input) {
    for (int64_t o = 0; o < conv_.outputs; ++o) {
      body(o * matrix_row_, input_.pitch, o * row, taps, conv_.inputs);
    }
  } else {
    for (int64_t c = 0; c < conv_.inputs; ++c) {
      body(c * matrix_row_, conv_.inputs * matrix_row_, c * taps, row, conv_.outputs);
    }
  }
}

template <class T>
void GradientPlan<T>::to_gradient(const T* matrix, T* gradient) const {
  if (form_ == Form::planar) {
    std::copy_n(matrix, matrix_size(), gradient);
    return;
  }
  for_each_block([&](int64_t at, int64_t pitch, int64_t to, int64_t to_pitch, int64_t size) {
    const T* from = matrix + at;
    kernels_.transpose(
        gradient + to, to_pitch, from, kDtype<T>, pitch, 1, conv_.taps(), size, T(1));
  });
}

template <class T>
void GradientPlan<T>::from_gradient(const T* gradient, T* matrix) const {
  if (form_ == Form::planar) {
    std::copy_n(gradient, matrix_size(), matrix);
    return;
  }
  for_each_block([&](int64_t at, int64_t pitch, int64_t from, int64_t from_pitch, int64_t size) {
    const T* source = gradient + from;
    kernels_.transpose(
        matrix + at, pitch, source, kDtype<T>, from_pitch, 1, size, conv_.taps(), T(1));
  });
}

template class GradientPlan<float>;
template class GradientPlan<double>;

}  // namespace l2rw
