#pragma once

// Stands in for csrc/cuda/util/ptx.cuh: the instructions as the PTX manual defines them.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <cstdint>

namespace l2rw::cuda {

template <int Alignment>
inline char* dynamic_shared_memory() {
  return emulator::shared_memory();
}

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - emulator::shared_memory());
}

inline int opaque(int value) { return value; }

// What lies at an address of shared memory.
inline char* shared_at(uint32_t address, int bytes) {
  if (address % static_cast<uint32_t>(bytes) != 0 ||
      int64_t{address} + bytes > emulator::shared_bytes()) {
    emulator::stop("shared memory at " + std::to_string(address));
  }
  return emulator::shared_memory() + address;
}

inline void cp_async(uint32_t to, const char* from, int bytes) {
  if (bytes < 0 || bytes > 16 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    emulator::stop("a copy of " + std::to_string(bytes) + " bytes, or from an odd address");
  }
  emulator::copy_later(shared_at(to, 16), from, bytes, 16);
}

inline void cp_async_cached(uint32_t to, const char* from, int bytes) { cp_async(to, from, bytes); }

inline void cp_async_commit() { emulator::close_copies(); }

template <int Newer>
inline void cp_async_wait() {
  emulator::wait_for_copies(Newer);
}

inline void ldmatrix(
    uint32_t (&matrices)[4], uint32_t address, emulator::Place place = emulator::Place::current()) {
  const char* const shown = emulator::exchange(&address, sizeof(address), place);
  const int lane = emulator::lane();
  for (int k = 0; k < 4; ++k) {
    const auto row = emulator::shown_by<uint32_t>(shown, 8 * k + lane / 4);
    std::memcpy(&matrices[k], shared_at(row, 16) + lane % 4 * 4, 4);
  }
}

template <int Count>
inline void ldmatrix_transposed(
    uint32_t (&matrices)[Count],
    uint32_t address,
    emulator::Place place = emulator::Place::current()) {
  const char* const shown = emulator::exchange(&address, sizeof(address), place);
  const int lane = emulator::lane();
  for (int k = 0; k < Count; ++k) {
    for (int half = 0; half < 2; ++half) {
      const auto row = emulator::shown_by<uint32_t>(shown, 8 * k + lane % 4 * 2 + half);
      std::memcpy(
          reinterpret_cast<char*>(&matrices[k]) + 2 * half, shared_at(row, 16) + lane / 4 * 2, 2);
    }
  }
}

template <class T>
inline void round_operand(uint32_t& value) {
  if constexpr (std::is_same_v<T, float>) {
    const uint32_t magnitude = value & 0x7fffffffu;
    if (magnitude < 0x7f800000u) {  // ties away from zero
      value = (value + 0x1000u) & 0xffffe000u;
    }
  }
}

// D[16, 8] += A[16, K] B[K, 8], 32 bits of K at a time in a register.
template <class T>
inline void mma_sync(
    float& d0,
    float& d1,
    float& d2,
    float& d3,
    const uint32_t (&a)[4],
    uint32_t b0,
    uint32_t b1,
    emulator::Place place = emulator::Place::current()) {
  constexpr int kCount = 4 / static_cast<int>(sizeof(T));  // numbers of a register
  using Registers = std::array<uint32_t, 6>;
  const Registers mine{a[0], a[1], a[2], a[3], b0, b1};
  const char* const shown = emulator::exchange(&mine, sizeof(mine), place);
  const int lane = emulator::lane();
  const auto number = [&](int of_lane, int reg, int k) {
    uint32_t bits = emulator::shown_by<Registers>(shown, of_lane)[reg];
    if constexpr (sizeof(T) == 4) {
      bits &= 0xffffe000u;  // the other digits are truncated
    }
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(&bits) + k * sizeof(T), sizeof(T));
    return static_cast<float>(value);
  };
  float* const sums[4] = {&d0, &d1, &d2, &d3};
  for (int s = 0; s < 4; ++s) {
    const int row = lane / 4 + s / 2 * 8;
    const int column = lane % 4 * 2 + s % 2;
    float sum = *sums[s];
    for (int half = 0; half < 2; ++half) {
      for (int quad = 0; quad < 4; ++quad) {
        for (int k = 0; k < kCount; ++k) {
          sum += number(row % 8 * 4 + quad, row / 8 + 2 * half, k) *
                 number(column * 4 + quad, 4 + half, k);
        }
      }
    }
    *sums[s] = sum;
  }
}

constexpr bool kHasWgmma = true;

inline void fence_async_proxy() { emulator::show_copies(); }

inline void fence_register(float&) {}

inline void wgmma_fence(emulator::Place place = emulator::Place::current()) {
  emulator::exchange(nullptr, 0, place);
  emulator::fence_products();
}

inline void wgmma_commit(emulator::Place place = emulator::Place::current()) {
  emulator::exchange(nullptr, 0, place);
  emulator::close_products();
}

template <int Newer>
inline void wgmma_wait(emulator::Place place = emulator::Place::current()) {
  emulator::exchange(nullptr, 0, place);
  emulator::wait_for_products(Newer);
}

// The first 32 bytes of a row of the matrix that a descriptor describes.
template <class T>
inline std::array<float, 16> described_row(uint64_t descriptor, int row) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) {
    emulator::stop("a matrix without the swizzle of 128 bytes");
  }
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  std::array<float, 16> numbers;
  for (uint32_t half = 0; half < 2; ++half) {
    const auto r = static_cast<uint32_t>(row);
    uint32_t address = start + r / 8 * stride + r % 8 * 128 + half * 16;
    address ^= (address >> 7 & 7) << 4;
    const char* const vector = shared_at(address, 16);
    emulator::check_shown(vector);
    for (uint32_t k = 0; k < 8; ++k) {
      T value;
      std::memcpy(&value, vector + k * sizeof(T), sizeof(T));
      numbers[half * 8 + k] = static_cast<float>(value);
    }
  }
  return numbers;
}

template <class T, int Count>
inline void wgmma(
    float (&d)[2][Count],
    uint64_t a,
    uint64_t b,
    emulator::Place place = emulator::Place::current()) {
  emulator::exchange(nullptr, 0, place);
  const int lane = emulator::lane();
  const int first = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + lane / 4;
  emulator::multiply_later(a, b, [&d, a, b, first, lane] {
    const std::array<std::array<float, 16>, 2> left{
        described_row<T>(a, first), described_row<T>(a, first + 8)};
    for (int c = 0; c < Count; ++c) {
      const auto right = described_row<T>(b, c / 2 * 8 + lane % 4 * 2 + c % 2);
      for (int r = 0; r < 2; ++r) {
        for (int k = 0; k < 16; ++k) {
          d[r][c] += left[r][k] * right[k];
        }
      }
    }
  });
}

}  // namespace l2rw::cuda
