// The arithmetic of the region loss, shared by the CPU and the CUDA kernels: bins, gather weights, correlation, gradient.
//
// Notation. A feature map is (B, C, H, W). Adaptive average pooling makes of each image R = rows * cols vectors of C
// channels, the pooled tensor (B, R, C). With unit vectors u_i = v_i / |v_i| the correlation is m_ij = u_i . u_j (Eq. 5 of
// the paper), and the loss is the mean of (m_ij^S - m_ij^T)^2 over i, j and the batch (Eq. 6).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "host_device.h"

namespace mgd {

// A region below this norm has no direction: its correlations are 0 and it takes no gradient. MIN_NORM of mgd_ops.py.
constexpr double kMinNorm = 1e-6;

// Bin i of `bins` over `size` pixels is [bin_begin, bin_end), as in PyTorch's adaptive pooling; bins overlap by a pixel
// where the size does not divide. The integer type is the caller's: 32 bits are several times faster to divide on a GPU, and
// hold (size + 1) * (bins + 1) for every map that is not absurd (see check_sizes in region_cuda.cu).
template <typename int_t>
MGD_HD int_t bin_begin(int_t i, int_t size, int_t bins) { return i * size / bins; }
template <typename int_t>
MGD_HD int_t bin_end(int_t i, int_t size, int_t bins) { return ((i + 1) * size + bins - 1) / bins; }

// The bins that hold pixel y are first_bin to last_bin: bin_end > y from floor(y * bins / size) on, and bin_begin <= y up to
// ceil((y + 1) * bins / size) - 1.
template <typename int_t>
MGD_HD int_t first_bin(int_t y, int_t size, int_t bins) { return y * bins / size; }
template <typename int_t>
MGD_HD int_t last_bin(int_t y, int_t size, int_t bins) { return ((y + 1) * bins + size - 1) / size - 1; }

// Share of one pixel in the average of region (i, j).
template <typename acc_t, typename int_t>
MGD_HD acc_t pixel_weight(int_t i, int_t j, int_t height, int_t width, int_t rows, int_t cols) {
  const int_t h = bin_end(i, height, rows) - bin_begin(i, height, rows);
  const int_t w = bin_end(j, width, cols) - bin_begin(j, width, cols);
  return acc_t(1) / (acc_t(h) * acc_t(w));
}

// Gradient of one pixel of one channel: the sum over the regions that hold it. `grad` points at region (0, 0) of that
// channel, already times pixel_weight; regions are `stride` apart.
template <typename acc_t, typename int_t>
MGD_HD acc_t gather(const acc_t* grad, int_t i0, int_t i1, int_t j0, int_t j1, int_t cols, int_t stride) {
  acc_t sum = 0;
  for (int_t i = i0; i <= i1; ++i)
    for (int_t j = j0; j <= j1; ++j) sum += grad[(i * cols + j) * stride];
  return sum;
}

// |v|, or infinity for a region without direction, so that everything divided by it vanishes. Vectors are divided by it, and
// not multiplied by its inverse, so that the direction of a single channel is 1 or -1 to the bit, and its gradient 0. A nan is
// not below the limit, so that it reaches the loss.
template <typename acc_t>
MGD_HD acc_t norm_of(acc_t squared_norm) {
  return squared_norm < acc_t(kMinNorm * kMinNorm) ? std::numeric_limits<acc_t>::infinity() : std::sqrt(squared_norm);
}

// d loss / d m_ij, both places of the symmetric pair together, for a batch of `batch` images.
template <typename acc_t>
MGD_HD acc_t loss_gradient(acc_t student, acc_t teacher, int64_t batch, int64_t regions) {
  return acc_t(4) * (student - teacher) / (acc_t(batch) * acc_t(regions) * acc_t(regions));
}

// d / d v of u = v / |v| applied to a gradient `du` of u: the part along u does not count.
template <typename acc_t>
MGD_HD acc_t normalize_gradient(acc_t du, acc_t u, acc_t du_dot_u, acc_t norm) {
  return (du - du_dot_u * u) / norm;
}

}  // namespace mgd
