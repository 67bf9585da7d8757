#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace l2rw {
namespace {

Isa detect() {
#ifdef __x86_64__
  const char* limit = std::getenv("L2RW_CPU_ISA");
  const bool only_baseline = limit != nullptr && std::strcmp(limit, "baseline") == 0;
  const bool only_avx2 = limit != nullptr && std::strcmp(limit, "avx2") == 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && !only_baseline && !only_avx2) {
    return Isa::avx512;
  }
  if (avx2 && !only_baseline) {
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace l2rw

// For l2rw_ext.doctor, which reads it with ctypes: the library carries no Python.
extern "C" __attribute__((visibility("default"))) const char* l2rw_cpu_isa() {
  switch (l2rw::cpu_isa()) {
    case l2rw::Isa::avx512:
      return "avx512";
    case l2rw::Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}
