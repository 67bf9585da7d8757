#pragma once

// The instruction sets the inner loops are compiled for, and the one this processor runs.

namespace l2rw {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set that both the processor and L2RW_CPU_ISA (baseline, avx2 or avx512; read
// once, when first asked) allow.
Isa cpu_isa();

}  // namespace l2rw

// L2RW_FOR_EACH_ISA(declarations...) declares the same functions in the namespace of every
// instruction set; L2RW_ISA_CALL(function, arguments...) calls the one of the instruction set in
// use.
#ifdef __x86_64__
#define L2RW_FOR_EACH_ISA(...) \
  namespace l2rw::baseline {   \
  __VA_ARGS__                  \
  }                            \
  namespace l2rw::avx2 {       \
  __VA_ARGS__                  \
  }                            \
  namespace l2rw::avx512 {     \
  __VA_ARGS__                  \
  }
#define L2RW_ISA_CALL(function, ...)                                                \
  (::l2rw::cpu_isa() == ::l2rw::Isa::avx512 ? ::l2rw::avx512::function(__VA_ARGS__) \
   : ::l2rw::cpu_isa() == ::l2rw::Isa::avx2 ? ::l2rw::avx2::function(__VA_ARGS__)   \
                                            : ::l2rw::baseline::function(__VA_ARGS__))
#else
#define L2RW_FOR_EACH_ISA(...) \
  namespace l2rw::baseline {   \
  __VA_ARGS__                  \
  }
#define L2RW_ISA_CALL(function, ...) ::l2rw::baseline::function(__VA_ARGS__)
#endif
