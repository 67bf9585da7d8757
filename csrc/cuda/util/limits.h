#pragma once

// How much memory a launch may use.

#include <cstddef>
#include <cstdint>

namespace l2rw::cuda {

// What a kernel may allocate beside its inputs, unless one sum for each row alone needs more.
constexpr int64_t kWorkspaceBytes = int64_t{16} << 20;

// Bytes of kernel arguments that every driver and architecture accepts.
constexpr size_t kParameterBytes = 4096;

}  // namespace l2rw::cuda
