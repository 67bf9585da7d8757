#pragma once

// Vectors: numbers that one instruction loads or stores, 16 bytes at most.

namespace l2rw::cuda {

constexpr int kVectorBytes = 16;

template <class T, int Count>
struct alignas(sizeof(T) * Count) Vector {
  T values[Count];
};

// Elements of the widest vector.
template <class T>
constexpr int kVectorElements = kVectorBytes / static_cast<int>(sizeof(T));

}  // namespace l2rw::cuda
