#pragma once

// Instructions that CUDA C++ has no word for: copies that run beside the computation, and tensor
// cores. The tests have a twin of this file for the host (python_tests/emulator).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace l2rw::cuda {

// The memory whose size the launch gave.
__device__ __forceinline__ char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) char shared[];
  return shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies `bytes` and fills the vector of 16 bytes with zeros.
__device__ __forceinline__ void copy_vector(uint32_t to, const char* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

// The same, by way of the cache of the processor: for what its threads copy more than once.
__device__ __forceinline__ void copy_vector_cached(uint32_t to, const char* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void close_stage() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the newest `Newer` stages have arrived.
template <int Newer>
__device__ __forceinline__ void wait_for_stage() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Newer) : "memory");
}

// Four matrices of eight rows of 16 bytes; the lanes' addresses are those of the 32 rows.
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// The same, with each matrix transposed: a lane receives two numbers of two bytes of a column.
__device__ __forceinline__ void load_transposed(uint32_t (&matrices)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// Two of them: the addresses of the upper lanes are not used.
__device__ __forceinline__ void load_transposed(uint32_t (&matrices)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(matrices[0]), "=r"(matrices[1])
               : "r"(address)
               : "memory");
}

// Prepares an operand. TF32 is rounded to nearest: multiplication itself would cut off, and all
// products would shrink.
template <class T>
__device__ __forceinline__ void round_operand(uint32_t& value) {
  if constexpr (std::is_same_v<T, float>) {
    asm("cvt.rna.tf32.f32 %0, %0;" : "+r"(value));
  }
}

#define L2RW_MULTIPLY_MATRICES(INSTRUCTION)                                          \
  asm(INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// D += A B on tensor cores, for 32 bytes of the depth: 16 rows, 8 columns. T: float is TF32.
template <class T>
__device__ __forceinline__ void multiply_matrices(
    float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    L2RW_MULTIPLY_MATRICES("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (std::is_same_v<T, __half>) {
    L2RW_MULTIPLY_MATRICES("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    static_assert(std::is_same_v<T, float>);
    L2RW_MULTIPLY_MATRICES("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
  }
}

#undef L2RW_MULTIPLY_MATRICES

// Products of warpgroups, four warps that multiply straight from shared memory while they go on.
// Only sm_90a has them.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif

// Shows products of warpgroups what copies that this thread has waited for have written.
__device__ __forceinline__ void show_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Before the first of a series of products: the sums are the tensor cores' from here on.
__device__ __forceinline__ void open_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void close_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until all but the newest `Newer` series have been added to their sums.
template <int Newer>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Newer) : "memory");
}

// Keeps the compiler from moving what happens to a sum to the other side of a product or a wait.
__device__ __forceinline__ void hold(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }

// clang-format off
#define L2RW_SUMS(j) \
  "+f"(d[0][2 * (j)]), "+f"(d[0][2 * (j) + 1]), "+f"(d[1][2 * (j)]), "+f"(d[1][2 * (j) + 1])
#define L2RW_FOUR_SUMS(j) \
  L2RW_SUMS(j), L2RW_SUMS((j) + 1), L2RW_SUMS((j) + 2), L2RW_SUMS((j) + 3)
#define L2RW_EIGHT_SUMS(j) L2RW_FOUR_SUMS(j), L2RW_FOUR_SUMS((j) + 4)
#define L2RW_MULTIPLY_128(TYPE)                                          \
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
#define L2RW_MULTIPLY_192(TYPE)                                          \
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

// D += A Bᵀ for 32 bytes of the depth, 64 rows by 4 Count columns, by a warpgroup. A lane's sums
// lie as those of multiply_matrices, a warp's 16 rows after those of the warp before.
template <class T, int Count>
__device__ __forceinline__ void multiply_warpgroup(float (&d)[2][Count], uint64_t a, uint64_t b) {
  constexpr bool kBfloat = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kBfloat || std::is_same_v<T, __half>);
  static_assert(Count == 32 || Count == 48);
  if constexpr (kBfloat && Count == 32) {
    L2RW_MULTIPLY_128("bf16");
  } else if constexpr (kBfloat) {
    L2RW_MULTIPLY_192("bf16");
  } else if constexpr (Count == 32) {
    L2RW_MULTIPLY_128("f16");
  } else {
    L2RW_MULTIPLY_192("f16");
  }
}

#undef L2RW_MULTIPLY_192
#undef L2RW_MULTIPLY_128
#undef L2RW_EIGHT_SUMS
#undef L2RW_FOUR_SUMS
#undef L2RW_SUMS

}  // namespace l2rw::cuda
