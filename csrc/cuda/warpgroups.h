#pragma once

// Whether to multiply by warpgroups.

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <cstdlib>
#include <string_view>

namespace l2rw::cuda {

// Whether a device can form products of warpgroups, this library was built for it, and
// L2RW_CUDA_WARPGROUPS=1 asks for them. They are not what is taken by itself: no GPU has run them,
// so that nothing says yet that they are right, and faster than what every architecture has.
inline bool warpgroups_wanted([[maybe_unused]] int32_t device) {
#ifdef L2RW_SM90A
  static const bool asked = [] {
    const char* const value = std::getenv("L2RW_CUDA_WARPGROUPS");
    return value != nullptr && std::string_view(value) == "1";
  }();
  if (!asked) {
    return false;
  }
  int major = 0;
  int minor = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major == 9 && minor == 0;
#else
  return false;
#endif
}

}  // namespace l2rw::cuda
