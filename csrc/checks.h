#pragma once

// The building blocks of argument checks, and the dtypes that they accept. Every message names
// operator, argument and value. All checks of an operator run before its first dispatcher call,
// because at this ABI target an error raised inside such a call loses its text.

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace l2rw {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;  // one for each layer

// An operator's argument and the name the messages give it.
struct Argument {
  const char* name;
  const Tensor& tensor;
};

template <class... Parts>
[[noreturn]] void fail(const char* operation, const Parts&... parts) {
  std::ostringstream message;
  message << "l2rw_ext::" << operation << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void check(bool condition, const char* operation, const Parts&... parts) {
  if (!condition) [[unlikely]] {
    fail(operation, parts...);
  }
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text << (d == 0 ? "" : ", ") << tensor.size(d);
  }
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// What sums are formed in, and scores and weight gradients returned in: float64 stays, everything
// narrower accumulates in float32.
inline ScalarType accumulation_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
using accumulation_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline void check_dim(const char* operation, Argument argument, int64_t dim) {
  check(
      argument.tensor.dim() == dim,
      operation,
      argument.name,
      " must have ",
      dim,
      dim == 1 ? " dimension" : " dimensions",
      ", got shape ",
      shape_of(argument.tensor));
}

// `argument` has size `size` in dimension `d`; `what` says what that size is.
inline void check_size(
    const char* operation, Argument argument, int64_t d, int64_t size, const char* what) {
  check(
      argument.tensor.size(d) == size,
      operation,
      argument.name,
      " must have size ",
      size,
      " (",
      what,
      ") in dimension ",
      d,
      ", got shape ",
      shape_of(argument.tensor));
}

inline void check_floating(const char* operation, Argument argument) {
  const ScalarType dtype = argument.tensor.scalar_type();
  check(
      dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
          dtype == ScalarType::Half,
      operation,
      argument.name,
      " must be float64, float32, bfloat16 or float16, got ",
      dtype_name(dtype));
}

inline void check_device(const char* operation, Argument reference, Argument argument) {
  const auto expected = reference.tensor.device();
  const auto actual = argument.tensor.device();
  check(
      expected == actual,
      operation,
      argument.name,
      " must be on the device of ",
      reference.name,
      ", got device type ",
      static_cast<int>(actual.type()),
      " index ",
      static_cast<int>(actual.index()),
      " and device type ",
      static_cast<int>(expected.type()),
      " index ",
      static_cast<int>(expected.index()));
}

// `argument` shares dtype and device with `reference`.
inline void check_same(const char* operation, Argument reference, Argument argument) {
  check_device(operation, reference, argument);
  check(
      argument.tensor.scalar_type() == reference.tensor.scalar_type(),
      operation,
      argument.name,
      " must have the dtype of ",
      reference.name,
      " (",
      dtype_name(reference.tensor.scalar_type()),
      "), got ",
      dtype_name(argument.tensor.scalar_type()));
}

// `argument` has the shape of `reference` as well.
inline void check_like(const char* operation, Argument reference, Argument argument) {
  check_same(operation, reference, argument);
  check_dim(operation, argument, reference.tensor.dim());
  const std::string what = std::string("as ") + reference.name;
  for (int64_t d = 0; d < reference.tensor.dim(); ++d) {
    check_size(operation, argument, d, reference.tensor.size(d), what.c_str());
  }
}

// `argument` shares the device of `reference` and has its dtype or its accumulation dtype: what a
// direction, a weight or a saved statistic may have.
inline void check_same_or_accumulation(
    const char* operation, Argument reference, Argument argument) {
  check_device(operation, reference, argument);
  const ScalarType dtype = reference.tensor.scalar_type();
  const ScalarType actual = argument.tensor.scalar_type();
  check(
      actual == dtype || actual == accumulation_dtype(dtype),
      operation,
      argument.name,
      " must have the dtype of ",
      reference.name,
      " (",
      dtype_name(dtype),
      ") or its accumulation dtype (",
      dtype_name(accumulation_dtype(dtype)),
      "), got ",
      dtype_name(actual));
}

// `vector`, if it is there, has `size` numbers and such a dtype; `what` says what that size is.
inline void check_vector(
    const char* operation,
    Argument reference,
    const char* name,
    const OptionalTensor& vector,
    int64_t size,
    const char* what) {
  if (vector) {
    const Argument argument{name, *vector};
    check_same_or_accumulation(operation, reference, argument);
    check_dim(operation, argument, 1);
    check_size(operation, argument, 0, size, what);
  }
}

// Calls body(T{}) with the C++ type of a floating dtype that has been checked.
template <class Body>
auto dispatch_floating(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      return body(Half{});
  }
}

// The same with the type that the dtype accumulates in.
template <class Body>
auto dispatch_accumulation(ScalarType dtype, const Body& body) {
  return dtype == ScalarType::Double ? body(double{}) : body(float{});
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Null without a tensor.
template <class T>
T* data(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

}  // namespace l2rw
