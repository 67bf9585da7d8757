#pragma once

// The words of CUDA C++ for a host compiler, included before a .cu file: its kernels then run on
// the host, thread by thread, each as a fiber that gives way where it waits for others.
//
// What is an error here that hardware may forgive: a barrier that not all threads of a block reach,
// or that they reach in different places; lanes of a warp that do not take part in its exchanges;
// copies that nobody waited for; vectors at odd addresses (by the compiler's sanitizer).

#include <torch/csrc/stable/library.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __shared__ static
#define __align__(bytes) alignas(bytes)

// The operators get names of their own, on tensors of the host.
#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(l2rw_emulated, m)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) \
  _STABLE_TORCH_LIBRARY_IMPL(l2rw_emulated, CPU, m, C10_UID)

using std::isfinite;
using std::isinf;
using std::isnan;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

using Place = std::source_location;

constexpr int kLanes = 32;
constexpr int kPayload = 64;  // bytes that a lane may show the others

struct Settings {
  int64_t processors = 132;
  bool tf32 = false;
  bool warpgroups = false;
  int64_t workspace_bytes = int64_t{16} << 20;
};
inline Settings settings;
inline int64_t largest_shared = 0;  // bytes of shared memory that a launch has asked for

// Runs `thread` for every thread of every block, one block after the other, in an order of threads
// that changes from block to block. Throws what goes wrong.
void run(int64_t blocks, dim3 threads, int64_t shared_bytes, const std::function<void()>& thread);

// Below: for threads that run.

[[noreturn]] void stop(const std::string& reason);
void wait_for_block(Place place);
// Shows `bytes` to the lanes of the warp and returns what they showed, `kPayload` apart, once all
// have. It stays there until the next exchange but one.
const char* exchange(const void* shown, int bytes, Place place);
int lane();
int lanes();  // of this warp: fewer than 32 at the end of an odd block

char* shared_memory();
int64_t shared_bytes();
// Copies that run beside the computation: each arrives at some time before it is waited for.
void copy_later(void* to, const void* from, int bytes, int filled);
void close_copies();
void wait_for_copies(int newer);
// Products of warpgroups do not see what copies write before the thread that copied shows it.
void show_copies();
void check_shown(const void* address);
// Products that run beside the computation: each is formed at some time before it is waited for. A
// group of them begins with a fence, and the threads of a warpgroup have the same matrices, which
// `a` and `b` describe.
void fence_products();
void multiply_later(uint64_t a, uint64_t b, std::function<void()> product);
void close_products();
void wait_for_products(int newer);

template <class T>
T shown_by(const char* shown, int lane) {
  T value;
  std::memcpy(&value, shown + lane * kPayload, sizeof(T));
  return value;
}

template <class T>
T shuffle(unsigned mask, T value, int source, Place place) {
  static_assert(std::is_trivially_copyable_v<T>);
  if (mask != 0xffffffffu) {
    stop("a shuffle without all lanes");
  }
  const char* const shown = exchange(&value, sizeof(T), place);
  return source >= 0 && source < lanes() ? shown_by<T>(shown, source) : value;
}

}  // namespace emulator

inline void __syncthreads(emulator::Place place = emulator::Place::current()) {
  emulator::wait_for_block(place);
}

inline void __syncwarp(unsigned = 0xffffffffu, emulator::Place place = emulator::Place::current()) {
  emulator::exchange(nullptr, 0, place);
}

template <class T>
T __shfl_sync(
    unsigned mask, T value, int lane, emulator::Place place = emulator::Place::current()) {
  return emulator::shuffle(mask, value, lane, place);
}

template <class T>
T __shfl_xor_sync(
    unsigned mask, T value, int distance, emulator::Place place = emulator::Place::current()) {
  return emulator::shuffle(mask, value, emulator::lane() ^ distance, place);
}

template <class T>
T __shfl_down_sync(
    unsigned mask, T value, int distance, emulator::Place place = emulator::Place::current()) {
  return emulator::shuffle(mask, value, emulator::lane() + distance, place);
}

inline unsigned __ballot_sync(
    unsigned, int predicate, emulator::Place place = emulator::Place::current()) {
  const char* const shown = emulator::exchange(&predicate, sizeof(predicate), place);
  unsigned ballot = 0;
  for (int lane = 0; lane < emulator::lanes(); ++lane) {
    ballot |= (emulator::shown_by<int>(shown, lane) != 0 ? 1u : 0u) << lane;
  }
  return ballot;
}

inline int __popc(unsigned bits) { return std::popcount(bits); }

#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition)                           \
  do {                                                          \
    if (!(condition)) {                                         \
      emulator::stop("assertion " #condition " does not hold"); \
    }                                                           \
  } while (false)

inline void __trap() { emulator::stop("a trap"); }
