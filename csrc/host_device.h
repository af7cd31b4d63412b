// What functions that both CPU and CUDA kernels call are declared with.
#pragma once

#ifdef __CUDACC__
#define MGD_HD __host__ __device__ __forceinline__
#else
#define MGD_HD inline
#endif
