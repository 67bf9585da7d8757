#pragma once

// The only file with PTX: asynchronous copies, tensor cores, and what keeps the compiler from
// moving code. Functions carry the names of their instructions, where there is one. The tests
// replace this file by one that runs on the host (python_tests/cuda/emulator).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace l2rw::cuda {

// The shared memory whose size the launch gave, at a multiple of Alignment. Behind what a kernel
// declares itself, a larger one than it needs would be lost memory.
template <int Alignment>
__device__ __forceinline__ char* dynamic_shared_memory() {
  static_assert(Alignment == 16 || Alignment == 1024);
  if constexpr (Alignment == 16) {
    extern __shared__ __align__(16) char vectors[];
    return vectors;
  } else {
    extern __shared__ __align__(1024) char patterns[];
    return patterns;
  }
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same number, from which nothing has been computed before this place. What is needed only
// after a loop would otherwise be computed before it, and take registers in it.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Copies `bytes` and fills the rest of a vector of 16 bytes with zeros.
__device__ __forceinline__ void cp_async(uint32_t to, const char* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

// The same through the first-level cache, for what the threads of a processor copy more than once.
__device__ __forceinline__ void cp_async_cached(uint32_t to, const char* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the newest `Newer` groups of copies have arrived.
template <int Newer>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Newer) : "memory");
}

// Loads four matrices of eight rows of 16 bytes. The addresses of the lanes are those of the 32
// rows.
__device__ __forceinline__ void ldmatrix(uint32_t (&matrices)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// The same with each matrix transposed, so that a lane receives two 16-bit numbers of a column.
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&matrices)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// The same for two matrices. The addresses of the upper lanes are not used.
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&matrices)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(matrices[0]), "=r"(matrices[1])
               : "r"(address)
               : "memory");
}

// Prepares an operand. TF32 is rounded to nearest, because the multiplication itself truncates, and
// all products would be too small.
template <class T>
__device__ __forceinline__ void round_operand(uint32_t& value) {
  if constexpr (std::is_same_v<T, float>) {
    asm("cvt.rna.tf32.f32 %0, %0;" : "+r"(value));
  }
}

#define L2RW_MMA_SYNC(INSTRUCTION)                                                   \
  asm(INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// D += A B on tensor cores, for 16 rows, 8 columns and 32 bytes of the depth. float means TF32.
template <class T>
__device__ __forceinline__ void mma_sync(
    float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    L2RW_MMA_SYNC("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (std::is_same_v<T, __half>) {
    L2RW_MMA_SYNC("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    static_assert(std::is_same_v<T, float>);
    L2RW_MMA_SYNC("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
  }
}

#undef L2RW_MMA_SYNC

// wgmma: the four warps of a warpgroup multiply from shared memory, and go on before the product is
// formed. Only sm_90a has it.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// Makes the copies that this thread has waited for visible to wgmma, which reads shared memory
// through another proxy.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Precedes the first wgmma of a group, to which the accumulators belong from here on.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until all but the newest `Newer` groups have been added to their accumulators.
template <int Newer>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Newer) : "memory");
}

// Keeps the compiler from moving accesses of an accumulator across a wgmma or a wait.
__device__ __forceinline__ void fence_register(float& sum) {
  asm volatile("" : "+f"(sum)::"memory");
}

// clang-format off
#define L2RW_SUMS(j) \
  "+f"(d[0][2 * (j)]), "+f"(d[0][2 * (j) + 1]), "+f"(d[1][2 * (j)]), "+f"(d[1][2 * (j) + 1])
#define L2RW_FOUR_SUMS(j) \
  L2RW_SUMS(j), L2RW_SUMS((j) + 1), L2RW_SUMS((j) + 2), L2RW_SUMS((j) + 3)
#define L2RW_EIGHT_SUMS(j) L2RW_FOUR_SUMS(j), L2RW_FOUR_SUMS((j) + 4)
#define L2RW_WGMMA_128(TYPE)                                          \
  asm volatile(                                                          \
      "{ .reg .pred p; setp.ne.b32 p, 1, 0;"                             \
      " wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" \
      " %0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11,"               \
      " %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23,"     \
      " %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35,"     \
      " %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"     \
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59,"     \
      " %60, %61, %62, %63},"                                            \
      " %64, %65, p, 1, 1, 0, 0; }"                                      \
      : L2RW_EIGHT_SUMS(0), L2RW_EIGHT_SUMS(8)                           \
      : "l"(a), "l"(b))
#define L2RW_WGMMA_192(TYPE)                                          \
  asm volatile(                                                          \
      "{ .reg .pred p; setp.ne.b32 p, 1, 0;"                             \
      " wgmma.mma_async.sync.aligned.m64n192k16.f32." TYPE "." TYPE " {" \
      " %0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11,"               \
      " %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23,"     \
      " %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35,"     \
      " %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"     \
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59,"     \
      " %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71,"     \
      " %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83,"     \
      " %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95},"    \
      " %96, %97, p, 1, 1, 0, 0; }"                                      \
      : L2RW_EIGHT_SUMS(0), L2RW_EIGHT_SUMS(8), L2RW_EIGHT_SUMS(16)      \
      : "l"(a), "l"(b))
// clang-format on

// D += A Bᵀ by a warpgroup, for 64 rows, 4 Count columns and 32 bytes of the depth. The
// accumulators of a lane lie as those of mma_sync, the 16 rows of a warp after those of the warp
// before.
template <class T, int Count>
__device__ __forceinline__ void wgmma(float (&d)[2][Count], uint64_t a, uint64_t b) {
  constexpr bool kBfloat = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kBfloat || std::is_same_v<T, __half>);
  static_assert(Count == 32 || Count == 48);
  if constexpr (kBfloat && Count == 32) {
    L2RW_WGMMA_128("bf16");
  } else if constexpr (kBfloat) {
    L2RW_WGMMA_192("bf16");
  } else if constexpr (Count == 32) {
    L2RW_WGMMA_128("f16");
  } else {
    L2RW_WGMMA_192("f16");
  }
}

#undef L2RW_WGMMA_192
#undef L2RW_WGMMA_128
#undef L2RW_EIGHT_SUMS
#undef L2RW_FOUR_SUMS
#undef L2RW_SUMS

}  // namespace l2rw::cuda
