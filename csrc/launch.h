// What every launch of a CUDA kernel needs: the stream of PyTorch, the size of its grid, and a look at its error.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

#include "dtypes.h"

namespace mgd {

inline cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// The number of blocks of a launch, which CUDA limits to 31 bits.
inline unsigned grid_side(int64_t blocks) {
  STD_TORCH_CHECK(blocks < int64_t(1) << 31, "mgd: the batch is too large for the CUDA kernels; set MGD_OPS=torch");
  return unsigned(blocks);
}

inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "mgd: kernel launch failed: ", cudaGetErrorString(error));
}

}  // namespace mgd
