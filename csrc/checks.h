// What the ops check of their arguments, on every device: mgd_ops.py refuses the same with better messages, but the ops can be
// called without it, and nothing here may read out of bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "dtypes.h"
#include "upsample_math.h"

namespace mgd {

inline bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

inline void check_map(const Tensor& map) {
  STD_TORCH_CHECK(map.dim() == 4 && map.size(1) > 0 && map.size(2) > 0 && map.size(3) > 0,
                  "mgd: features and logits have four dimensions, of which the batch alone may be 0");
  STD_TORCH_CHECK(is_float(map.scalar_type()), "mgd: features and logits must be float64, float32, float16 or bfloat16");
}

inline void check_device(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.device() == b.device(), "mgd: all tensors must be on one device");
}

inline void check_regions(int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(rows > 0 && cols > 0, "mgd: there must be at least 1x1 regions, not ", rows, "x", cols);
}

inline void check_features(const Tensor& student, const Tensor& teacher, int64_t rows, int64_t cols) {
  check_map(student), check_map(teacher);
  check_device(student, teacher);
  check_regions(rows, cols);
  STD_TORCH_CHECK(student.size(0) == teacher.size(0), "mgd: batches of ", student.size(0), " and ", teacher.size(0), " differ");
}

// Pooled vectors, or their gradient, (B, R, C), and what a backward makes of them: features of height x width and dtype.
inline void check_pooled(const Tensor& pooled, int64_t height, int64_t width, int64_t rows, int64_t cols, ScalarType dtype) {
  check_regions(rows, cols);
  STD_TORCH_CHECK(pooled.dim() == 3 && pooled.size(1) == rows * cols && pooled.size(2) > 0 && is_float(pooled.scalar_type()),
                  "mgd: pooled vectors must be (B, ", rows * cols, ", C) of floats for ", rows, "x", cols, " regions");
  STD_TORCH_CHECK(height > 0 && width > 0 && is_float(dtype), "mgd: a gradient must be of floats and not empty");
}

// The gradient (B, R, R) of the correlation of pooled vectors.
inline void check_correlation(const Tensor& grad, const Tensor& pooled) {
  check_device(grad, pooled);
  const int64_t regions = pooled.size(1);
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == pooled.size(0) && grad.size(1) == regions && grad.size(2) == regions &&
                      is_float(grad.scalar_type()),
                  "mgd: the gradient of a correlation must be (B, ", regions, ", ", regions, ") of floats");
}

inline void check_labels(const Tensor& logits, const std::vector<Tensor>& maps) {
  check_map(logits);
  STD_TORCH_CHECK(logits.size(1) <= kIgnore, "mgd: there can be at most 255 classes, not ", logits.size(1));
  STD_TORCH_CHECK(!maps.empty(), "mgd: there is no label map");
  for (const Tensor& map : maps) {
    check_device(logits, map);
    STD_TORCH_CHECK(map.dim() == 3 && map.scalar_type() == ScalarType::Long && map.size(0) == logits.size(0) &&
                        map.size(1) == maps[0].size(1) && map.size(2) == maps[0].size(2) && map.size(1) > 0 && map.size(2) > 0,
                    "mgd: labels must be (B, H, W) of int64, of the logits' batch and of one size");
  }
}

inline void check_sums(const Tensor& grad, const Tensor& logits, const std::vector<Tensor>& maps) {
  check_labels(logits, maps);
  check_device(grad, logits);
  STD_TORCH_CHECK(grad.dim() == 1 && grad.size(0) == int64_t(maps.size()) && is_float(grad.scalar_type()),
                  "mgd: the gradient must be one float for each of ", maps.size(), " label maps");
}

inline void check_size(const Tensor& logits, int64_t height, int64_t width) {
  check_map(logits);
  STD_TORCH_CHECK(logits.size(1) <= kIgnore, "mgd: there can be at most 255 classes, not ", logits.size(1));
  STD_TORCH_CHECK(height > 0 && width > 0, "mgd: logits cannot be brought to ", height, "x", width);
}

}  // namespace mgd
