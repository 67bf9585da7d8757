#pragma once

// The annotations of code that the host's compiler takes as well as nvcc. Headers with the suffix
// .h have nothing else, so that tests can run them on a machine without a GPU.

#ifdef __CUDACC__
#define L2RW_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define L2RW_HOST_DEVICE inline
#endif

// Arrays stay in registers only where the loops over them are unrolled. The host's compiler does
// not know these pragmas.
#ifdef __CUDA_ARCH__
#define L2RW_PRAGMA(text) _Pragma(#text)
#define L2RW_UNROLL _Pragma("unroll")
#define L2RW_UNROLL_BY(count) L2RW_PRAGMA(unroll(count))
#else
#define L2RW_UNROLL
#define L2RW_UNROLL_BY(count)
#endif
