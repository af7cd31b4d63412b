// CUDA kernels of the region ops. The schemas are defined in mgd_ops.py; here they get an implementation for CUDA.
//
// Forward: pool the features (each read once), then one block a row of the correlation matrix computes its part of the loss
// and the gradient of its vector, then one block adds the parts up. Backward: one kernel writes the gradient, each pixel
// gathering from the regions that hold it. No atomics, so results repeat bit by bit; no synchronisation with the host.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "checks.h"
#include "dtypes.h"
#include "launch.h"
#include "region_math.h"

namespace mgd {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;

struct Map {  // a feature map: sizes, and strides in elements, 64 bits wide since B * C * H * W may exceed 2^31
  int64_t batch, channels, height, width;
  int64_t sb, sc, sh, sw;
};

// Bins are computed with 32 bits; offsets into tensors with 64. Two rows of the correlation, in float64 16 bytes a region, must
// fit into 48 KB of shared memory beside the few sums of a block.
void check_sizes(int64_t height, int64_t width, int64_t rows, int64_t cols) {
  constexpr int64_t kLimit = int64_t(1) << 31;
  STD_TORCH_CHECK((height + 1) * (rows + 1) < kLimit && (width + 1) * (cols + 1) < kLimit && height * width < kLimit,
                  "mgd: features of ", height, "x", width, " with ", rows, "x", cols,
                  " regions are too large for the CUDA kernels; set MGD_OPS=torch");
  STD_TORCH_CHECK(rows * cols <= 3000, "mgd: ", rows, "x", cols,
                  " regions are too many for the CUDA kernels, which take 3000; set MGD_OPS=torch for more");
}

Map map_of(const Tensor& t) {
  return {t.size(0), t.size(1), t.size(2), t.size(3), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// kVec neighbours as one memory access.
template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Pack {
  T v[kVec];
};

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Pool maps whose columns lie side by side (or have any strides, with kVec = 1). One warp an image's channel and row of
// regions; each lane sums kVec columns over the rows of the bin, then the warp adds columns up to regions.
template <typename T, typename acc_t, int kVec>
__global__ void __launch_bounds__(kThreads)
    pool_planes(const T* __restrict__ in, acc_t* __restrict__ pooled, Map m, int rows, int cols) {
  constexpr int kSpan = kWarp * kVec;  // columns a pass
  __shared__ acc_t columns[kThreads / kWarp][kSpan];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t task = int64_t(blockIdx.x) * (kThreads / kWarp) + warp;  // (b, c, i), the row of regions fastest
  if (task >= m.batch * m.channels * rows) return;
  const int64_t c = task / rows % m.channels, b = task / rows / m.channels;
  const int i = int(task % rows), height = int(m.height), width = int(m.width);
  const int y0 = bin_begin(i, height, rows), y1 = bin_end(i, height, rows);
  const T* plane = in + b * m.sb + c * m.sc;
  for (int first_col = 0; first_col < cols; first_col += kWarp) {  // region `j` of this lane
    const int last = min(cols, first_col + kWarp) - 1, j = min(first_col + lane, last);
    const int x0 = bin_begin(j, width, cols), x1 = bin_end(j, width, cols);
    acc_t sum = 0;
    const int from = bin_begin(first_col, width, cols) / kVec * kVec, to = bin_end(last, width, cols);
    for (int start = from; start < to; start += kSpan) {
      acc_t part[kVec] = {};
      const int x = start + lane * kVec;
      if (x < width) {
        const T* p = plane + x * m.sw;
#pragma unroll 4
        for (int y = y0; y < y1; ++y) {
          const Pack<T, kVec> pack = *reinterpret_cast<const Pack<T, kVec>*>(p + y * m.sh);
#pragma unroll
          for (int k = 0; k < kVec; ++k) part[k] += static_cast<acc_t>(pack.v[k]);
        }
      }
#pragma unroll
      for (int k = 0; k < kVec; ++k) columns[warp][lane * kVec + k] = part[k];
      __syncwarp();
      for (int q = max(x0, start); q < min(x1, start + kSpan); ++q) sum += columns[warp][q - start];
      __syncwarp();
    }
    if (first_col + lane <= last)
      pooled[((b * rows + i) * cols + j) * m.channels + c] = sum * pixel_weight<acc_t>(i, j, height, width, rows, cols);
  }
}

// Pool maps whose channels lie side by side. One block a region and up to kWarp * kVec channels; its warps share the pixels.
template <typename T, typename acc_t, int kVec>
__global__ void __launch_bounds__(kThreads)
    pool_pixels(const T* __restrict__ in, acc_t* __restrict__ pooled, Map m, int rows, int cols) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ acc_t parts[kWarps][kWarp * kVec];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int region = blockIdx.x % (rows * cols), i = region / cols, j = region % cols;
  const int height = int(m.height), width = int(m.width);
  const int64_t b = blockIdx.x / (rows * cols), c = (int64_t(blockIdx.y) * kWarp + lane) * kVec;
  const int y0 = bin_begin(i, height, rows), y1 = bin_end(i, height, rows);
  const int x0 = bin_begin(j, width, cols), span = bin_end(j, width, cols) - x0;
  acc_t sum[kVec] = {};
  if (c < m.channels) {
    const T* p = in + b * m.sb + c;
#pragma unroll 4
    for (int q = warp; q < (y1 - y0) * span; q += kWarps) {
      const int64_t y = y0 + q / span, x = x0 + q % span;
      const Pack<T, kVec> pack = *reinterpret_cast<const Pack<T, kVec>*>(p + y * m.sh + x * m.sw);
#pragma unroll
      for (int k = 0; k < kVec; ++k) sum[k] += static_cast<acc_t>(pack.v[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < kVec; ++k) parts[warp][lane * kVec + k] = sum[k];
  __syncthreads();
  for (int k = threadIdx.x; k < kWarp * kVec; k += kThreads) {
    const int64_t channel = int64_t(blockIdx.y) * kWarp * kVec + k;
    if (channel >= m.channels) continue;
    acc_t total = 0;
    for (int w = 0; w < kWarps; ++w) total += parts[w][k];
    pooled[(b * rows * cols + region) * m.channels + channel] = total * pixel_weight<acc_t>(i, j, height, width, rows, cols);
  }
}

bool aligned(const void* p, const Map& m, int64_t unit, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0 && m.sb * unit % bytes == 0 && m.sh * unit % bytes == 0;
}

// feat (B, C, H, W), any strides -> (B, R, C) averages, float32 or float64.
Tensor pool(const Tensor& feat, int64_t rows, int64_t cols) {
  const Map m = map_of(feat);
  check_sizes(m.height, m.width, rows, cols);
  Tensor pooled = torch::stable::new_empty(feat, {m.batch, rows * cols, m.channels}, acc_type(feat.scalar_type()));
  if (pooled.numel() == 0) return pooled;
  const cudaStream_t stream = stream_of(feat);
  dispatch(feat.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using acc_t = acc_of<T>;
    constexpr int kVec = sizeof(T) == 8 ? 2 : 4;
    const T* in = static_cast<const T*>(feat.const_data_ptr());
    acc_t* out = static_cast<acc_t*>(pooled.mutable_data_ptr());
    const bool fits = aligned(in, m, sizeof(T), sizeof(T) * kVec);
    if (is_channels_last(feat)) {
      const bool vector = fits && m.sw % kVec == 0 && m.channels % kVec == 0;
      const int64_t width = kWarp * (vector ? kVec : 1);
      const int64_t parts = (m.channels + width - 1) / width;
      STD_TORCH_CHECK(parts <= 65535, "mgd: ", m.channels, " channels are too many for the CUDA kernels; set MGD_OPS=torch");
      const dim3 grid(grid_side(m.batch * rows * cols), unsigned(parts));
      if (vector) pool_pixels<T, acc_t, kVec><<<grid, kThreads, 0, stream>>>(in, out, m, int(rows), int(cols));
      else pool_pixels<T, acc_t, 1><<<grid, kThreads, 0, stream>>>(in, out, m, int(rows), int(cols));
    } else {
      const bool vector = fits && m.sw == 1 && m.sc % kVec == 0 && m.width % kVec == 0;
      const int64_t tasks = m.batch * m.channels * rows, warps = kThreads / kWarp;
      const unsigned grid = grid_side((tasks + warps - 1) / warps);
      if (vector) pool_planes<T, acc_t, kVec><<<grid, kThreads, 0, stream>>>(in, out, m, int(rows), int(cols));
      else pool_planes<T, acc_t, 1><<<grid, kThreads, 0, stream>>>(in, out, m, int(rows), int(cols));
    }
    check_launch();
  });
  return pooled;
}

// Dot product over the lanes of a warp; every lane gets it.
template <typename acc_t>
__device__ acc_t warp_dot(const acc_t* a, const acc_t* b, int64_t n) {
  acc_t sum = 0;
  for (int64_t k = threadIdx.x % kWarp; k < n; k += kWarp) sum += a[k] * b[k];
  return warp_sum(sum);
}

// Row i of the correlation of one image: m[j] = u_i . u_j for all j, in shared memory, by one block.
template <typename acc_t>
__device__ void correlation_row(const acc_t* __restrict__ pooled, acc_t* m, int64_t i, int64_t regions, int64_t channels) {
  const acc_t* v = pooled + i * channels;
  const acc_t norm_i = norm_of(warp_dot(v, v, channels));
  for (int64_t j = threadIdx.x / kWarp; j < regions; j += blockDim.x / kWarp) {
    const acc_t* w = pooled + j * channels;
    acc_t cross = 0, squared = 0;
    for (int64_t k = threadIdx.x % kWarp; k < channels; k += kWarp) {
      cross += v[k] * w[k];
      squared += w[k] * w[k];
    }
    cross = warp_sum(cross);
    squared = warp_sum(squared);
    if (threadIdx.x % kWarp == 0) m[j] = cross / norm_i / norm_of(squared);
  }
}

// Gradient of the pooled vector i of one image, by one block, from dm[j] = the gradient of m_ij in both places. With
// u_j = v_j / |v_j|, the block first turns dm[j] into the factor of v_j.
template <typename acc_t>
__device__ void vector_gradient(const acc_t* __restrict__ pooled, acc_t* dm, acc_t* __restrict__ grad, int64_t i,
                                int64_t regions, int64_t channels) {
  __shared__ acc_t parts[kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t j = warp; j < regions; j += kThreads / kWarp) {
    const acc_t norm_j = norm_of(warp_dot(pooled + j * channels, pooled + j * channels, channels));
    if (lane == 0) dm[j] /= norm_j;
  }
  __syncthreads();
  const acc_t* v = pooled + i * channels;
  const acc_t norm = norm_of(warp_dot(v, v, channels));
  acc_t along = 0;
  for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
    acc_t du = 0;
    for (int64_t j = 0; j < regions; ++j) du += dm[j] * pooled[j * channels + c];
    grad[i * channels + c] = du;
    along += du * (v[c] / norm);
  }
  along = warp_sum(along);
  if (lane == 0) parts[warp] = along;
  __syncthreads();
  acc_t total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) total += parts[w];
  for (int64_t c = threadIdx.x; c < channels; c += kThreads)
    grad[i * channels + c] = normalize_gradient(grad[i * channels + c], v[c] / norm, total, norm);
}

// One block a pooled vector (b, i): its row of both correlations, its part of the loss, its gradient.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads)
    loss_rows(const acc_t* __restrict__ student, const acc_t* __restrict__ teacher, acc_t* __restrict__ parts,
              acc_t* __restrict__ grad, int64_t batch, int64_t regions, int64_t channels, int64_t other) {
  extern __shared__ __align__(16) unsigned char bytes[];
  acc_t* ours = reinterpret_cast<acc_t*>(bytes);  // (R)
  acc_t* theirs = ours + regions;                 // (R)
  const int64_t b = blockIdx.x / regions, i = blockIdx.x % regions;
  const acc_t* pooled = student + b * regions * channels;
  correlation_row(pooled, ours, i, regions, channels);
  correlation_row(teacher + b * regions * other, theirs, i, regions, other);
  __syncthreads();
  if (threadIdx.x < kWarp) {
    acc_t sum = 0;
    for (int64_t j = threadIdx.x; j < regions; j += kWarp) {
      const acc_t m = ours[j], t = theirs[j];
      sum += (m - t) * (m - t);
      ours[j] = loss_gradient(m, t, batch, regions);
    }
    sum = warp_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
  }
  __syncthreads();
  vector_gradient(pooled, ours, grad + b * regions * channels, i, regions, channels);
}

// One block: loss = sum of n parts / count.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads)
    add_parts(const acc_t* __restrict__ parts, acc_t* __restrict__ loss, int64_t n, double count) {
  __shared__ double sums[kThreads / kWarp];
  double sum = 0;
  for (int64_t k = threadIdx.x; k < n; k += kThreads) sum += double(parts[k]);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) total += sums[w];
    *loss = n ? acc_t(total / count) : acc_t(0);
  }
}

template <typename acc_t>
__global__ void __launch_bounds__(kThreads)
    correlation_rows(const acc_t* __restrict__ pooled, acc_t* __restrict__ correlation, int64_t regions, int64_t channels) {
  const int64_t b = blockIdx.x / regions, i = blockIdx.x % regions;
  correlation_row(pooled + b * regions * channels, correlation + (b * regions + i) * regions, i, regions, channels);
}

template <typename acc_t>
__global__ void __launch_bounds__(kThreads)
    correlation_gradient(const acc_t* __restrict__ grad, const acc_t* __restrict__ pooled, acc_t* __restrict__ grad_pooled,
                         int64_t regions, int64_t channels) {
  extern __shared__ __align__(16) unsigned char bytes[];
  acc_t* dm = reinterpret_cast<acc_t*>(bytes);  // (R)
  const int64_t b = blockIdx.x / regions, i = blockIdx.x % regions;
  const acc_t* g = grad + b * regions * regions;
  for (int64_t j = threadIdx.x; j < regions; j += kThreads) dm[j] = g[i * regions + j] + g[j * regions + i];
  __syncthreads();
  vector_gradient(pooled + b * regions * channels, dm, grad_pooled + b * regions * channels, i, regions, channels);
}

// Write the gradient of contiguous maps. One block a plane: its regional gradients go to shared memory, already times
// weight and scale; each thread keeps its kVec columns and walks down the rows.
template <typename T, typename acc_t, int kVec>
__global__ void __launch_bounds__(kThreads)
    unpool_planes(const acc_t* __restrict__ grad_pooled, const acc_t* __restrict__ scale, T* __restrict__ out, int64_t channels,
                  int height, int width, int rows, int cols) {
  extern __shared__ __align__(16) unsigned char bytes[];
  acc_t* regional = reinterpret_cast<acc_t*>(bytes);  // (R)
  const int64_t b = blockIdx.x / channels, c = blockIdx.x % channels;
  const int regions = rows * cols, thread = int(threadIdx.x);
  const acc_t factor = scale ? *scale : acc_t(1);
  for (int r = thread; r < regions; r += kThreads)
    regional[r] = factor * pixel_weight<acc_t>(r / cols, r % cols, height, width, rows, cols) *
                  grad_pooled[(b * regions + r) * channels + c];
  __syncthreads();
  const int groups = (width + kVec - 1) / kVec;  // of kVec columns
  const int across = min(groups, kThreads), down = kThreads / across;
  if (thread >= across * down) return;
  T* plane = out + int64_t(blockIdx.x) * height * width;
  for (int x = thread % across * kVec; x < width; x += across * kVec) {
    int j0[kVec], j1[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) j0[k] = first_bin(x + k, width, cols), j1[k] = last_bin(x + k, width, cols);
    Pack<T, kVec> pack;
    int before0 = -1, before1 = -1;  // the bins of the row before, which most rows share
    for (int y = thread / across; y < height; y += down) {
      const int i0 = first_bin(y, height, rows), i1 = last_bin(y, height, rows);
      if (i0 != before0 || i1 != before1) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) pack.v[k] = static_cast<T>(gather(regional, i0, i1, j0[k], j1[k], cols, 1));
        before0 = i0, before1 = i1;
      }
      *reinterpret_cast<Pack<T, kVec>*>(plane + int64_t(y) * width + x) = pack;
    }
  }
}

// Write the gradient of channels_last maps. One block a row of pixels, one thread kVec channels of a pixel at a time; the
// weights of the row's regions go to shared memory.
template <typename T, typename acc_t, int kVec>
__global__ void __launch_bounds__(kThreads)
    unpool_pixels(const acc_t* __restrict__ grad_pooled, const acc_t* __restrict__ scale, T* __restrict__ out, int64_t channels,
                  int height, int width, int rows, int cols) {
  extern __shared__ __align__(16) unsigned char bytes[];
  acc_t* weights = reinterpret_cast<acc_t*>(bytes);  // (R), of which rows i0 to i1 are used
  const int64_t b = blockIdx.x / height;
  const int y = int(blockIdx.x % height), thread = int(threadIdx.x);
  const int i0 = first_bin(y, height, rows), i1 = last_bin(y, height, rows);
  const acc_t factor = scale ? *scale : acc_t(1);
  for (int r = i0 * cols + thread; r < (i1 + 1) * cols; r += kThreads)
    weights[r] = factor * pixel_weight<acc_t>(r / cols, r % cols, height, width, rows, cols);
  __syncthreads();
  const acc_t* g = grad_pooled + b * rows * cols * channels;
  T* line = out + int64_t(blockIdx.x) * width * channels;
  const int64_t groups = channels / kVec;
  const int across = int(min(groups, int64_t(kThreads))), down = kThreads / across;
  if (thread >= across * down) return;
  for (int x = thread / across; x < width; x += down) {
    const int j0 = first_bin(x, width, cols), j1 = last_bin(x, width, cols);
    for (int64_t c = thread % across * kVec; c < channels; c += int64_t(across) * kVec) {
      acc_t sum[kVec] = {};
      for (int i = i0; i <= i1; ++i)
        for (int j = j0; j <= j1; ++j) {
          const acc_t weight = weights[i * cols + j];
          const Pack<acc_t, kVec> pack = *reinterpret_cast<const Pack<acc_t, kVec>*>(g + (i * cols + j) * channels + c);
#pragma unroll
          for (int k = 0; k < kVec; ++k) sum[k] += weight * pack.v[k];
        }
      Pack<T, kVec> pack;
#pragma unroll
      for (int k = 0; k < kVec; ++k) pack.v[k] = static_cast<T>(sum[k]);
      *reinterpret_cast<Pack<T, kVec>*>(line + x * channels + c) = pack;
    }
  }
}

// Scatter the gradient of the pooled vectors (B, R, C), times the scalar at `scale` where there is one, over the pixels.
Tensor unpool(const Tensor& grad_pooled, const Tensor* scale, int64_t height, int64_t width, int64_t rows, int64_t cols,
              ScalarType dtype, bool channels_last) {
  const int64_t batch = grad_pooled.size(0), channels = grad_pooled.size(2);
  check_sizes(height, width, rows, cols);
  Tensor grad = empty_map(batch, channels, height, width, dtype, grad_pooled.device(), channels_last);
  if (grad.numel() == 0) return grad;
  const cudaStream_t stream = stream_of(grad_pooled);
  dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    using acc_t = acc_of<T>;
    constexpr int kVec = 16 / sizeof(T);  // 16 bytes a store
    const acc_t* in = static_cast<const acc_t*>(grad_pooled.const_data_ptr());
    const acc_t* factor = scale ? static_cast<const acc_t*>(scale->const_data_ptr()) : nullptr;
    T* out = static_cast<T*>(grad.mutable_data_ptr());
    const int h = int(height), w = int(width), r = int(rows), c = int(cols);
    const size_t shared = size_t(rows * cols) * sizeof(acc_t);
    if (channels_last) {
      const unsigned grid = grid_side(batch * height);
      if (channels % kVec == 0)
        unpool_pixels<T, acc_t, kVec><<<grid, kThreads, shared, stream>>>(in, factor, out, channels, h, w, r, c);
      else unpool_pixels<T, acc_t, 1><<<grid, kThreads, shared, stream>>>(in, factor, out, channels, h, w, r, c);
    } else {
      const unsigned grid = grid_side(batch * channels);
      if (width % kVec == 0)
        unpool_planes<T, acc_t, kVec><<<grid, kThreads, shared, stream>>>(in, factor, out, channels, h, w, r, c);
      else unpool_planes<T, acc_t, 1><<<grid, kThreads, shared, stream>>>(in, factor, out, channels, h, w, r, c);
    }
    check_launch();
  });
  return grad;
}

}  // namespace

// -> loss (), gradient of the loss with respect to the student's pooled vectors (B, R, C)
std::tuple<Tensor, Tensor> region_loss(const Tensor& student, const Tensor& teacher, int64_t rows, int64_t cols) {
  check_features(student, teacher, rows, cols);
  const torch::stable::accelerator::DeviceGuard guard(student.get_device_index());
  const Tensor ours = pool(student, rows, cols), theirs = pool(teacher, rows, cols);
  const int64_t batch = ours.size(0), regions = rows * cols, channels = ours.size(2), other = theirs.size(2);
  // float64 where either is; both pools are brought to one type
  const bool wide = ours.scalar_type() == ScalarType::Double || theirs.scalar_type() == ScalarType::Double;
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor a = torch::stable::to(ours, type), b = torch::stable::to(theirs, type);
  Tensor loss = torch::stable::new_empty(a, {}, type), grad = torch::stable::new_empty(a, {batch, regions, channels}, type);
  Tensor parts = torch::stable::new_empty(a, {batch * regions}, type);
  const cudaStream_t stream = stream_of(student);
  dispatch(type, [&](auto tag) {
    using acc_t = acc_of<decltype(tag)>;
    if (batch > 0) {
      loss_rows<acc_t><<<grid_side(batch * regions), kThreads, 2 * regions * sizeof(acc_t), stream>>>(
          static_cast<const acc_t*>(a.const_data_ptr()), static_cast<const acc_t*>(b.const_data_ptr()),
          static_cast<acc_t*>(parts.mutable_data_ptr()), static_cast<acc_t*>(grad.mutable_data_ptr()), batch, regions, channels,
          other);
      check_launch();
    }
    add_parts<acc_t><<<1, kThreads, 0, stream>>>(static_cast<const acc_t*>(parts.const_data_ptr()),
                                                 static_cast<acc_t*>(loss.mutable_data_ptr()), batch * regions,
                                                 double(batch) * double(regions) * double(regions));
    check_launch();
  });
  return {loss, grad};
}

Tensor region_loss_backward(const Tensor& grad_loss, const Tensor& grad_pooled, int64_t height, int64_t width, int64_t rows,
                            int64_t cols, ScalarType dtype, bool channels_last) {
  check_pooled(grad_pooled, height, width, rows, cols, dtype);
  check_device(grad_loss, grad_pooled);
  STD_TORCH_CHECK(grad_loss.dim() == 0 && is_float(grad_loss.scalar_type()), "mgd: the gradient of the loss must be a scalar");
  const torch::stable::accelerator::DeviceGuard guard(grad_pooled.get_device_index());
  const Tensor scale = torch::stable::to(grad_loss, acc_type(dtype));
  return unpool(dense(grad_pooled, acc_type(dtype)), &scale, height, width, rows, cols, dtype, channels_last);
}

// -> correlation (B, R, R), pooled vectors (B, R, C)
std::tuple<Tensor, Tensor> pooled_correlation(const Tensor& feat, int64_t rows, int64_t cols) {
  check_features(feat, feat, rows, cols);
  const torch::stable::accelerator::DeviceGuard guard(feat.get_device_index());
  Tensor pooled = pool(feat, rows, cols);
  const int64_t batch = pooled.size(0), regions = rows * cols, channels = pooled.size(2);
  Tensor correlation = torch::stable::new_empty(pooled, {batch, regions, regions});
  if (batch > 0)
    dispatch(pooled.scalar_type(), [&](auto tag) {
      using acc_t = acc_of<decltype(tag)>;
      correlation_rows<acc_t><<<grid_side(batch * regions), kThreads, 0, stream_of(feat)>>>(
          static_cast<const acc_t*>(pooled.const_data_ptr()), static_cast<acc_t*>(correlation.mutable_data_ptr()), regions,
          channels);
      check_launch();
    });
  return {correlation, pooled};
}

Tensor pooled_correlation_backward(const Tensor& grad, const Tensor& pooled, int64_t height, int64_t width, int64_t rows,
                                   int64_t cols, ScalarType dtype, bool channels_last) {
  check_pooled(pooled, height, width, rows, cols, dtype);
  check_correlation(grad, pooled);
  check_sizes(height, width, rows, cols);
  const torch::stable::accelerator::DeviceGuard guard(pooled.get_device_index());
  const Tensor g = dense(grad, acc_type(dtype)), p = dense(pooled, acc_type(dtype));
  const int64_t batch = p.size(0), regions = rows * cols, channels = p.size(2);
  Tensor grad_pooled = torch::stable::new_empty(p, {batch, regions, channels});
  if (batch > 0)
    dispatch(p.scalar_type(), [&](auto tag) {
      using acc_t = acc_of<decltype(tag)>;
      correlation_gradient<acc_t><<<grid_side(batch * regions), kThreads, regions * sizeof(acc_t), stream_of(p)>>>(
          static_cast<const acc_t*>(g.const_data_ptr()), static_cast<const acc_t*>(p.const_data_ptr()),
          static_cast<acc_t*>(grad_pooled.mutable_data_ptr()), regions, channels);
      check_launch();
    });
  return unpool(grad_pooled, nullptr, height, width, rows, cols, dtype, channels_last);
}

}  // namespace mgd

STABLE_TORCH_LIBRARY_IMPL(mgd, CUDA, m) {
  m.impl("region_loss", TORCH_BOX(&mgd::region_loss));
  m.impl("region_loss_backward", TORCH_BOX(&mgd::region_loss_backward));
  m.impl("pooled_correlation", TORCH_BOX(&mgd::pooled_correlation));
  m.impl("pooled_correlation_backward", TORCH_BOX(&mgd::pooled_correlation_backward));
}
