// CUDA kernels of the ops on upsampled logits. The schemas are defined in mgd_ops.py; here they get an implementation for
// CUDA.
//
// The full-size logits (B, N, H, W) never exist. Forward and argmax take one thread a full pixel, which interpolates the
// classes one after another and keeps a running maximum and sum of exponentials; the coarse logits it reads are those of its
// neighbours too, and come from the cache. Backward first finds the log-sum-exp of each full pixel, (B, H, W), the only
// scratch there is; then a thread takes a coarse pixel and a few classes and gathers from the full pixels around, so that
// each exponential is computed four times, but nothing is added up across threads. No atomics, so results repeat bit by bit;
// no synchronisation with the host. Label maps are read where they lie.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

#include <cassert>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "checks.h"
#include "dtypes.h"
#include "launch.h"
#include "upsample_math.h"

namespace mgd {
namespace {

constexpr int kWarp = 32;
constexpr int kRows = 8;  // a block takes kWarp x kRows full pixels
constexpr int kBlock = kWarp * kRows;
constexpr int kGather = 128;  // threads of a block that gathers
constexpr int kMaps = 16;     // label maps at most

// Sizes, and strides in elements. Offsets within an image of coarse logits fit into 32 bits, which saves half the registers;
// those of images and of full pixels may not.
struct Geometry {
  int64_t batch;
  int classes, h, w, height, width;  // coarse (h, w), full (height, width)
  int64_t sb;                        // of the coarse logits
  int sc, sh, sw;
};

Geometry geometry_of(const Tensor& t, int64_t height, int64_t width) {
  constexpr int64_t kLimit = int64_t(1) << 31;
  const int64_t reach = t.size(1) * t.stride(1) + t.size(2) * t.stride(2) + t.size(3) * t.stride(3);
  STD_TORCH_CHECK(t.size(2) * height < kLimit && t.size(3) * width < kLimit && reach < kLimit,
                  "mgd: logits of ", t.size(2), "x", t.size(3), " are too large for the CUDA kernels to be brought to ", height,
                  "x", width, "; set MGD_OPS=torch");
  STD_TORCH_CHECK(t.size(0) <= 65535 && height <= 65535 * kRows, "mgd: batches of over 65,535 images, or images of over ",
                  65535 * kRows, " rows, are too large for the CUDA kernels; set MGD_OPS=torch");  // sides of a grid
  return {t.size(0), int(t.size(1)), int(t.size(2)), int(t.size(3)), int(height), int(width),
          t.stride(0), int(t.stride(1)), int(t.stride(2)), int(t.stride(3))};
}

dim3 grid_of(const Geometry& g) {
  return dim3(unsigned((g.width + kWarp - 1) / kWarp), unsigned((g.height + kRows - 1) / kRows), unsigned(g.batch));
}

struct Labels {  // K contiguous maps (B, H, W)
  const int64_t* map[kMaps];
  int count;
};

// The tensors that `labels` points into are kept in `kept`.
Labels labels_of(const std::vector<Tensor>& maps, std::vector<Tensor>& kept) {
  STD_TORCH_CHECK(maps.size() <= kMaps, "mgd: ", maps.size(), " label maps are too many for the CUDA kernels, which take ",
                  kMaps, "; set MGD_OPS=torch for more");
  Labels labels{};
  for (const Tensor& map : maps) {
    kept.push_back(torch::stable::contiguous(map));
    labels.map[labels.count++] = static_cast<const int64_t*>(kept.back().const_data_ptr());
  }
  return labels;
}

// A logit `share` of the way from a to b. Forward and backward interpolate by this, first down and then across, so that both
// round alike: exp(logit - lse) of a sure class is 1 in both, however large the logits are. Where b has no weight it is not
// looked at, as it may not be finite.
template <typename acc_t>
__device__ __forceinline__ acc_t between(acc_t a, acc_t b, acc_t share) {
  return share > 0 ? std::fma(share, b, (acc_t(1) - share) * a) : a;
}

// A full pixel among the coarse ones: pointers to its four corners in class 0, and its place between them.
template <typename T>
struct Corners {
  using acc_t = acc_of<T>;
  const T *above_left, *above_right, *below_left, *below_right;
  acc_t down, across;

  __device__ Corners(const T* image, const Geometry& g, int y, int x) {
    const Place<acc_t, int> v = place<acc_t>(y, g.h, g.height), h = place<acc_t>(x, g.w, g.width);
    down = v.share, across = h.share;
    above_left = image + (v.cell * g.sh + h.cell * g.sw);
    // a corner without weight may not exist
    above_right = above_left + (across > 0 ? g.sw : 0);
    below_left = above_left + (down > 0 ? g.sh : 0);
    below_right = above_right + (down > 0 ? g.sh : 0);
  }

  __device__ acc_t logit(int offset) const {
    const acc_t left = between(static_cast<acc_t>(above_left[offset]), static_cast<acc_t>(below_left[offset]), down);
    const acc_t right = between(static_cast<acc_t>(above_right[offset]), static_cast<acc_t>(below_right[offset]), down);
    return between(left, right, across);
  }
};

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// The largest logit of a pixel, its class (the first of equals), and the sum over the classes of exp(logit - largest). A nan
// counts as larger than all else; the sum is nan where the largest is not finite, as in softmax.
template <typename acc_t>
struct Summary {
  acc_t top, sum;
  int winner;
};

template <typename T, typename acc_t = acc_of<T>>
__device__ Summary<acc_t> summarize(const Corners<T>& corners, const Geometry& g) {
  Summary<acc_t> s{corners.logit(0), acc_t(1), 0};
  constexpr acc_t infinity = std::numeric_limits<acc_t>::infinity();
  if (s.top == -infinity) s.sum = 0;
#pragma unroll 4
  for (int n = 1; n < g.classes; ++n) {
    const acc_t t = corners.logit(n * g.sc);
    if (t == -infinity) continue;  // adds nothing, and -inf - -inf would be nan
    const bool larger = t > s.top || (t != t && s.top == s.top);
    const acc_t e = exponential(larger ? s.top - t : t - s.top);
    s.sum = larger ? s.sum * e + acc_t(1) : s.sum + e;
    if (larger) s.top = t, s.winner = n;
  }
  if (!(s.top > -infinity && s.top < infinity)) s.sum = std::numeric_limits<acc_t>::quiet_NaN();
  return s;
}

// The sum over a block, on its first thread, always in one order.
__device__ double block_sum(double x) {
  __shared__ double parts[kBlock / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  __syncthreads();  // of the sum before, everything is read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < kBlock / kWarp; ++i) sum += parts[i];
  return sum;
}

// parts (K, blocks): the sums of the cross entropies of each block's pixels.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    cross_entropies(const T* __restrict__ logits, Labels labels, double* __restrict__ parts, Geometry g) {
  using acc_t = acc_of<T>;
  const int x = blockIdx.x * kWarp + threadIdx.x % kWarp, y = blockIdx.y * kRows + threadIdx.x / kWarp;
  const bool inside = x < g.width && y < g.height;
  const int64_t pixel = (int64_t(blockIdx.z) * g.height + y) * g.width + x;
  bool valid = false;
  if (inside)
    for (int k = 0; k < labels.count; ++k) {
      const int64_t label = labels.map[k][pixel];
      assert(label == kIgnore || (label >= 0 && label < g.classes));
      if (label != kIgnore) valid = true;
    }
  const Corners<T> corners(logits + blockIdx.z * g.sb, g, inside ? y : 0, inside ? x : 0);
  acc_t lse = 0;
  if (valid) {
    const Summary<acc_t> s = summarize(corners, g);
    lse = s.top + logarithm(s.sum);
  }
  const int64_t block = (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t blocks = int64_t(gridDim.x) * gridDim.y * gridDim.z;
  for (int k = 0; k < labels.count; ++k) {
    double loss = 0;
    if (valid) {
      const int64_t label = labels.map[k][pixel];
      if (label != kIgnore) loss = double(lse - corners.logit(int(label) * g.sc));
    }
    const double sum = block_sum(loss);
    if (threadIdx.x == 0) parts[k * blocks + block] = sum;
  }
}

// sums (K): one block each.
template <typename acc_t>
__global__ void __launch_bounds__(kBlock)
    add_parts(const double* __restrict__ parts, acc_t* __restrict__ sums, int64_t blocks) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kBlock) sum += parts[blockIdx.x * blocks + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = acc_t(sum);
}

// lse (B, H, W): the logarithm of the sum of the exponentials of each full pixel's logits.
template <typename T>
__global__ void __launch_bounds__(kBlock) log_sum_exp(const T* __restrict__ logits, acc_of<T>* __restrict__ lse, Geometry g) {
  const int x = blockIdx.x * kWarp + threadIdx.x % kWarp, y = blockIdx.y * kRows + threadIdx.x / kWarp;
  if (x >= g.width || y >= g.height) return;
  const Corners<T> corners(logits + blockIdx.z * g.sb, g, y, x);
  const Summary<acc_of<T>> s = summarize(corners, g);
  lse[(int64_t(blockIdx.z) * g.height + y) * g.width + x] = s.top + logarithm(s.sum);
}

// The gradient of a coarse pixel in kC classes, a thread: over the full pixels of the four cells it is a corner of, the sum of
// its weight there times sum_k scale_k (softmax - one hot), k over the maps in which the pixel has a class.
template <typename T, int kC>
__global__ void __launch_bounds__(kGather)
    gather_gradient(const T* __restrict__ logits, Labels labels, const acc_of<T>* __restrict__ lse,
                    const acc_of<T>* __restrict__ scale, T* __restrict__ grad, Geometry g, int64_t gb, int64_t gc, int64_t gh,
                    int64_t gw) {
  using acc_t = acc_of<T>;
  const int groups = (g.classes + kC - 1) / kC;
  int64_t task = int64_t(blockIdx.x) * kGather + threadIdx.x;  // (b, i, j, group), the group fastest
  if (task >= g.batch * g.h * g.w * groups) return;
  const int first = int(task % groups) * kC;
  task /= groups;
  const int j = int(task % g.w), i = int(task / g.w % g.h);
  const int64_t b = task / g.w / g.h;
  acc_t sum[kC] = {};
  // the loops are not unrolled, any of them: what is unrolled, the classes, already fills the registers
#pragma unroll 1
  for (int row = max(i - 1, 0); row <= i; ++row)
#pragma unroll 1
    for (int col = max(j - 1, 0); col <= j; ++col) {  // cells
      const int y1 = cell_begin(row + 1, g.h, g.height);
      const int x0 = cell_begin(col, g.w, g.width), x1 = cell_begin(col + 1, g.w, g.width);
      const T* p = logits + b * g.sb + (row * g.sh + col * g.sw + first * g.sc);
      const int right = col + 1 < g.w ? g.sw : 0, below = row + 1 < g.h ? g.sh : 0;
#pragma unroll 1
      for (int y = cell_begin(row, g.h, g.height); y < y1; ++y) {
        const acc_t down = place<acc_t>(y, g.h, g.height).share;
        acc_t from[kC], to[kC], part[kC] = {};  // the logits at the cell's left and right side in this row; a sum of the row's
#pragma unroll
        for (int c = 0; c < kC; ++c) {
          const T* q = p + (first + c < g.classes ? c : 0) * g.sc;
          from[c] = between(static_cast<acc_t>(q[0]), static_cast<acc_t>(q[below]), down);
          to[c] = between(static_cast<acc_t>(q[right]), static_cast<acc_t>(q[below + right]), down);
        }
#pragma unroll 1
        for (int x = x0; x < x1; ++x) {
          const acc_t across = place<acc_t>(x, g.w, g.width).share;
          const acc_t weight = col < j ? across : acc_t(1) - across;
          const int64_t pixel = (b * g.height + y) * g.width + x;
          acc_t total = 0, hot[kC] = {};  // of the scales: of all maps with a class, and of those with this class
#pragma unroll 1
          for (int k = 0; k < labels.count; ++k) {
            const int64_t label = labels.map[k][pixel];
            const acc_t s = label == kIgnore ? acc_t(0) : scale[k];
            total += s;
#pragma unroll
            for (int c = 0; c < kC; ++c) hot[c] += label == first + c ? s : acc_t(0);
          }
          const acc_t norm = lse[pixel];
#pragma unroll
          for (int c = 0; c < kC; ++c) {
            part[c] += weight * (total * exponential(between(from[c], to[c], across) - norm) - hot[c]);
          }
        }
        const acc_t weight = row < i ? down : acc_t(1) - down;
#pragma unroll
        for (int c = 0; c < kC; ++c) sum[c] += weight * part[c];
      }
    }
#pragma unroll
  for (int c = 0; c < kC; ++c)
    if (first + c < g.classes) grad[b * gb + (first + c) * gc + i * gh + j * gw] = static_cast<T>(sum[c]);
}

// labels (B, H, W): the class of the largest logit, 255 where its probability is below the threshold.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    argmax(const T* __restrict__ logits, int64_t* __restrict__ labels, acc_of<T> threshold, Geometry g) {
  const int x = blockIdx.x * kWarp + threadIdx.x % kWarp, y = blockIdx.y * kRows + threadIdx.x / kWarp;
  if (x >= g.width || y >= g.height) return;
  const Corners<T> corners(logits + blockIdx.z * g.sb, g, y, x);
  const Summary<acc_of<T>> s = summarize(corners, g);
  const bool unsure = threshold > 0 && acc_of<T>(1) / s.sum < threshold;
  labels[(int64_t(blockIdx.z) * g.height + y) * g.width + x] = unsure ? kIgnore : s.winner;
}

}  // namespace

// -> the sum of the cross entropies against each of K label maps (K)
Tensor upsampled_cross_entropy(const Tensor& logits, std::vector<Tensor> maps) {
  check_labels(logits, maps);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Geometry g = geometry_of(logits, maps[0].size(1), maps[0].size(2));
  std::vector<Tensor> kept;
  const Labels labels = labels_of(maps, kept);
  const dim3 grid = grid_of(g);
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  Tensor sums = torch::stable::new_empty(logits, {labels.count}, acc_type(logits.scalar_type()));
  Tensor parts = torch::stable::new_empty(logits, {labels.count * blocks}, ScalarType::Double);
  double* out = static_cast<double*>(parts.mutable_data_ptr());
  const cudaStream_t stream = stream_of(logits);
  dispatch(logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    if (blocks > 0) {
      cross_entropies<T><<<grid, kBlock, 0, stream>>>(static_cast<const T*>(logits.const_data_ptr()), labels, out, g);
      check_launch();
    }
    add_parts<acc_of<T>><<<labels.count, kBlock, 0, stream>>>(out, static_cast<acc_of<T>*>(sums.mutable_data_ptr()), blocks);
    check_launch();
  });
  return sums;
}

// The gradient with respect to the logits, from that of the sums (K).
Tensor upsampled_cross_entropy_backward(const Tensor& grad_sums, const Tensor& logits, std::vector<Tensor> maps) {
  check_sums(grad_sums, logits, maps);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Geometry g = geometry_of(logits, maps[0].size(1), maps[0].size(2));
  std::vector<Tensor> kept;
  const Labels labels = labels_of(maps, kept);
  Tensor grad = empty_gradient(logits);
  if (grad.numel() == 0) return grad;
  const ScalarType type = acc_type(logits.scalar_type());
  const Tensor scale = dense(grad_sums, type);
  Tensor lse = torch::stable::new_empty(logits, {g.batch, g.height, g.width}, type);
  const cudaStream_t stream = stream_of(logits);
  dispatch(logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using acc_t = acc_of<T>;
    constexpr int kC = 32 / sizeof(acc_t);  // classes whose logits and sums stay in registers
    const T* in = static_cast<const T*>(logits.const_data_ptr());
    log_sum_exp<T><<<grid_of(g), kBlock, 0, stream>>>(in, static_cast<acc_t*>(lse.mutable_data_ptr()), g);
    check_launch();
    const int64_t tasks = g.batch * g.h * g.w * ((g.classes + kC - 1) / kC);
    gather_gradient<T, kC><<<grid_side((tasks + kGather - 1) / kGather), kGather, 0, stream>>>(
        in, labels, static_cast<const acc_t*>(lse.const_data_ptr()), static_cast<const acc_t*>(scale.const_data_ptr()),
        static_cast<T*>(grad.mutable_data_ptr()), g, grad.stride(0), grad.stride(1), grad.stride(2), grad.stride(3));
    check_launch();
  });
  return grad;
}

// -> the class of the largest logit of each full pixel (B, H, W), 255 where its probability is below the threshold
Tensor upsampled_argmax(const Tensor& logits, int64_t height, int64_t width, double threshold) {
  check_size(logits, height, width);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Geometry g = geometry_of(logits, height, width);
  Tensor labels = torch::stable::new_empty(logits, {g.batch, height, width}, ScalarType::Long);
  if (labels.numel() == 0) return labels;
  dispatch(logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    argmax<T><<<grid_of(g), kBlock, 0, stream_of(logits)>>>(
        static_cast<const T*>(logits.const_data_ptr()), static_cast<int64_t*>(labels.mutable_data_ptr()), acc_of<T>(threshold),
        g);
    check_launch();
  });
  return labels;
}

}  // namespace mgd

STABLE_TORCH_LIBRARY_IMPL(mgd, CUDA, m) {
  m.impl("upsampled_cross_entropy", TORCH_BOX(&mgd::upsampled_cross_entropy));
  m.impl("upsampled_cross_entropy_backward", TORCH_BOX(&mgd::upsampled_cross_entropy_backward));
  m.impl("upsampled_argmax", TORCH_BOX(&mgd::upsampled_argmax));
}
