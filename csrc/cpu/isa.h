#pragma once

// The instruction sets the inner loops are compiled for, and the one this processor runs.

namespace l2rw {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set that both the processor and L2RW_CPU_ISA (baseline, avx2 or avx512; read
// once, when first asked) allow.
Isa cpu_isa();

}  // namespace l2rw

// Calls `function` from the namespace of the instruction set in use:
// L2RW_ISA_CALL(function, arguments...).
#ifdef L2RW_X86_ISA
#define L2RW_ISA_CALL(function, ...)                                                   \
  (::l2rw::cpu_isa() == ::l2rw::Isa::avx512                                            \
       ? ::l2rw::avx512::function(__VA_ARGS__)                                         \
       : (::l2rw::cpu_isa() == ::l2rw::Isa::avx2 ? ::l2rw::avx2::function(__VA_ARGS__) \
                                                 : ::l2rw::baseline::function(__VA_ARGS__)))
#else
#define L2RW_ISA_CALL(function, ...) ::l2rw::baseline::function(__VA_ARGS__)
#endif
