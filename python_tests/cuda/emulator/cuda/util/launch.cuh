#pragma once

// Stands in for csrc/cuda/util/launch.cuh: launches on the host, with the settings of the test.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "checks.h"

namespace l2rw::cuda {

class Launch {
 public:
  Launch(const char* operation, const Tensor&) : operation_(operation) {}

  int64_t processors() const { return emulator::settings.processors; }
  bool warpgroups() const { return emulator::settings.warpgroups; }
  int64_t workspace_bytes() const { return emulator::settings.workspace_bytes; }
  bool tf32_allowed() const { return emulator::settings.tf32; }

  template <class... Parameters, class... Arguments>
  void run(
      void (*kernel)(Parameters...),
      int64_t blocks,
      dim3 threads,
      int64_t shared_bytes,
      const Arguments&... arguments) const {
    check(blocks > 0, operation_, "a launch of ", blocks, " blocks");
    check(
        threads.x * threads.y * threads.z <= 1024, operation_, "more than 1024 threads of a block");
    const int64_t most = warpgroups() ? 227 << 10 : 99 << 10;
    check(shared_bytes <= most, operation_, shared_bytes, " bytes of shared memory");
    emulator::largest_shared = std::max(emulator::largest_shared, shared_bytes);
    const std::tuple<std::remove_const_t<Parameters>...> values(arguments...);
    try {
      emulator::run(blocks, threads, shared_bytes, [&] { std::apply(kernel, values); });
    } catch (const std::exception& error) {
      fail(operation_, error.what());
    }
  }

 private:
  const char* operation_;
};

}  // namespace l2rw::cuda
