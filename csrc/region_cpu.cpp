// CPU kernels of the region ops. The schemas are defined in mgd_ops.py; here they get an implementation for the CPU.
//
// Each feature map is read once, in its own memory order, and the gradient is written once; what lies between works on the
// pooled (B, R, C) tensor, under 1% of the features. Results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "region_math.h"

namespace mgd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
using acc_of = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f with a value of the C++ type of `dtype`.
template <typename F>
void dispatch(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Double: return f(double{});
    case ScalarType::Float: return f(float{});
    case ScalarType::Half: return f(c10::Half{});
    case ScalarType::BFloat16: return f(c10::BFloat16{});
    default: STD_TORCH_CHECK(false, "mgd: features must be float64, float32, float16 or bfloat16");
  }
}

ScalarType acc_type(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

struct Strides {
  int64_t b, c, h, w;
};

// sum[k] += the k-th of n values `step` apart. The unit step is a loop of its own, so that it becomes vector instructions.
template <typename T, typename acc_t>
void add_row(acc_t* sum, const T* p, int64_t n, int64_t step) {
  if (step == 1)
    for (int64_t k = 0; k < n; ++k) sum[k] += static_cast<acc_t>(p[k]);
  else
    for (int64_t k = 0; k < n; ++k) sum[k] += static_cast<acc_t>(p[k * step]);
}

template <typename T, typename acc_t>
void add_four_rows(acc_t* sum, const T* p, int64_t row, int64_t n) {
  const T *a = p, *b = p + row, *c = p + 2 * row, *d = p + 3 * row;
  for (int64_t k = 0; k < n; ++k)
    sum[k] += (static_cast<acc_t>(a[k]) + static_cast<acc_t>(b[k])) + (static_cast<acc_t>(c[k]) + static_cast<acc_t>(d[k]));
}

// sum[k] += over `count` rows, `row` apart, of n values `step` apart.
template <typename T, typename acc_t>
void add_rows(acc_t* sum, const T* p, int64_t count, int64_t row, int64_t n, int64_t step) {
  int64_t y = 0;
  if (step == 1)
    for (; y + 4 <= count; y += 4) add_four_rows(sum, p + y * row, row, n);
  for (; y < count; ++y) add_row(sum, p + y * row, n, step);
}

// Pool one channel plane: column sums of each row bin first, with whole rows as vectors, then their bins.
template <typename T, typename acc_t>
void pool_plane(const T* plane, acc_t* pooled, Strides s, int64_t channels, int64_t height, int64_t width, int64_t rows,
                int64_t cols, acc_t* columns) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t y0 = bin_begin(i, height, rows), y1 = bin_end(i, height, rows);
    std::fill(columns, columns + width, acc_t(0));
    add_rows(columns, plane + y0 * s.h, y1 - y0, s.h, width, s.w);
    for (int64_t j = 0; j < cols; ++j) {
      acc_t sum = 0;
      for (int64_t x = bin_begin(j, width, cols); x < bin_end(j, width, cols); ++x) sum += columns[x];
      pooled[(i * cols + j) * channels] = sum * pixel_weight<acc_t>(i, j, height, width, rows, cols);
    }
  }
}

// Pool one row of regions of an image whose channels lie side by side: whole pixels as vectors.
template <typename T, typename acc_t>
void pool_pixels(const T* image, acc_t* pooled, Strides s, int64_t channels, int64_t height, int64_t width, int64_t rows,
                 int64_t cols, int64_t i) {
  acc_t* out = pooled + i * cols * channels;
  std::fill(out, out + cols * channels, acc_t(0));
  for (int64_t y = bin_begin(i, height, rows); y < bin_end(i, height, rows); ++y)
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t x0 = bin_begin(j, width, cols), x1 = bin_end(j, width, cols);
      add_rows(out + j * channels, image + y * s.h + x0 * s.w, x1 - x0, s.w, channels, 1);
    }
  for (int64_t j = 0; j < cols; ++j) {
    const acc_t weight = pixel_weight<acc_t>(i, j, height, width, rows, cols);
    for (int64_t c = 0; c < channels; ++c) out[j * channels + c] *= weight;
  }
}

// feat (B, C, H, W), any strides -> (B, R, C) averages, float32 or float64.
Tensor pool(const Tensor& feat, int64_t rows, int64_t cols) {
  const int64_t batch = feat.size(0), channels = feat.size(1), height = feat.size(2), width = feat.size(3);
  const Strides s{feat.stride(0), feat.stride(1), feat.stride(2), feat.stride(3)};
  Tensor pooled = torch::stable::new_empty(feat, {batch, rows * cols, channels}, acc_type(feat.scalar_type()));
  dispatch(feat.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using acc_t = acc_of<T>;
    const T* in = static_cast<const T*>(feat.const_data_ptr());
    acc_t* out = static_cast<acc_t*>(pooled.mutable_data_ptr());
    if (s.c == 1 && s.w != 1) {
      torch::stable::parallel_for(0, batch * rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          pool_pixels(in + t / rows * s.b, out + t / rows * rows * cols * channels, s, channels, height, width, rows, cols,
                      t % rows);
      });
    } else {
      torch::stable::parallel_for(0, batch * channels, 1, [&](int64_t begin, int64_t end) {
        std::vector<acc_t> columns(width);
        for (int64_t t = begin; t < end; ++t) {
          const int64_t b = t / channels, c = t % channels;
          pool_plane(in + b * s.b + c * s.c, out + b * rows * cols * channels + c, s, channels, height, width, rows, cols,
                     columns.data());
        }
      });
    }
  });
  return pooled;
}

// Dot product in sixteen partial sums, which is one order of addition on every machine and becomes vector instructions.
template <typename acc_t>
acc_t dot(const acc_t* a, const acc_t* b, int64_t n) {
  constexpr int64_t kLanes = 16;
  acc_t sums[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) sums[l] += a[k + l] * b[k + l];
  acc_t sum = 0;
  for (; k < n; ++k) sum += a[k] * b[k];
  for (int64_t l = 0; l < kLanes; ++l) sum += sums[l];
  return sum;
}

// unit (R, C) and inverse norms (R) of the pooled vectors of one image.
template <typename acc_t>
void normalize(const acc_t* pooled, acc_t* unit, acc_t* inverse, int64_t regions, int64_t channels) {
  for (int64_t i = 0; i < regions; ++i) {
    const acc_t* v = pooled + i * channels;
    inverse[i] = inverse_norm(dot(v, v, channels));
    for (int64_t c = 0; c < channels; ++c) unit[i * channels + c] = v[c] * inverse[i];
  }
}

// grad (C) of the pooled vector i from the gradients `dm` (R) of row i of m, both places of each pair together.
template <typename acc_t>
void vector_gradient(const acc_t* dm, const acc_t* unit, const acc_t* inverse, acc_t* grad, int64_t i, int64_t regions,
                     int64_t channels) {
  std::fill(grad, grad + channels, acc_t(0));
  for (int64_t j = 0; j < regions; ++j) {
    const acc_t g = dm[j];
    const acc_t* u = unit + j * channels;
    for (int64_t c = 0; c < channels; ++c) grad[c] += g * u[c];
  }
  const acc_t* u = unit + i * channels;
  const acc_t along = dot(grad, u, channels);
  for (int64_t c = 0; c < channels; ++c) grad[c] = normalize_gradient(grad[c], u[c], along, inverse[i]);
}

// Scatter the gradient of the pooled vectors (B, R, C), times `scale`, over the pixels; pixels of the same regions share one
// value a channel, so each distinct row is computed once and then copied.
Tensor unpool(const Tensor& grad_pooled, double scale, int64_t height, int64_t width, int64_t rows, int64_t cols,
              ScalarType dtype, bool channels_last) {
  const int64_t batch = grad_pooled.size(0), regions = rows * cols, channels = grad_pooled.size(2);
  Tensor grad = torch::stable::empty(
      {batch, channels, height, width}, dtype, std::nullopt, grad_pooled.device(), std::nullopt,
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
  dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    using acc_t = acc_of<T>;
    const acc_t* in = static_cast<const acc_t*>(grad_pooled.const_data_ptr());
    T* out = static_cast<T*>(grad.mutable_data_ptr());
    if (channels_last) {
      torch::stable::parallel_for(0, batch * rows, 1, [&](int64_t begin, int64_t end) {
        std::vector<T> line(width * channels);
        for (int64_t t = begin; t < end; ++t) {
          const acc_t* g = in + t / rows * regions * channels;
          // row t % rows of regions writes the rows of pixels whose first region it is
          const int64_t i = t % rows;
          int64_t done = -1;
          for (int64_t y = bin_begin(i, height, rows); y < bin_end(i, height, rows); ++y) {
            if (first_bin(y, height, rows) != i) continue;
            const int64_t i1 = last_bin(y, height, rows);
            if (i1 != done)
              for (int64_t x = 0; x < width; ++x) {
                const int64_t j0 = first_bin(x, width, cols), j1 = last_bin(x, width, cols);
                T* pixel = line.data() + x * channels;
                if (x > 0 && j0 == first_bin(x - 1, width, cols) && j1 == last_bin(x - 1, width, cols)) {
                  std::memcpy(pixel, pixel - channels, channels * sizeof(T));
                  continue;
                }
                std::vector<acc_t> sum(channels, acc_t(0));
                for (int64_t a = i; a <= i1; ++a)
                  for (int64_t b = j0; b <= j1; ++b) {
                    const acc_t weight = acc_t(scale) * pixel_weight<acc_t>(a, b, height, width, rows, cols);
                    const acc_t* v = g + (a * cols + b) * channels;
                    for (int64_t c = 0; c < channels; ++c) sum[c] += weight * v[c];
                  }
                for (int64_t c = 0; c < channels; ++c) pixel[c] = static_cast<T>(sum[c]);
              }
            done = i1;
            std::memcpy(out + (t / rows * height + y) * width * channels, line.data(), line.size() * sizeof(T));
          }
        }
      });
    } else {
      torch::stable::parallel_for(0, batch * channels, 1, [&](int64_t begin, int64_t end) {
        std::vector<T> line(width);
        std::vector<acc_t> regional(regions);
        for (int64_t t = begin; t < end; ++t) {
          const acc_t* g = in + t / channels * regions * channels + t % channels;
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < cols; ++j)
              regional[i * cols + j] = acc_t(scale) * pixel_weight<acc_t>(i, j, height, width, rows, cols) *
                                       g[(i * cols + j) * channels];
          int64_t done0 = -1, done1 = -1;
          for (int64_t y = 0; y < height; ++y) {
            const int64_t i0 = first_bin(y, height, rows), i1 = last_bin(y, height, rows);
            if (i0 != done0 || i1 != done1) {
              for (int64_t x = 0; x < width; ++x)
                line[x] = static_cast<T>(gather(regional.data(), i0, i1, first_bin(x, width, cols), last_bin(x, width, cols),
                                                cols, int64_t(1)));
              done0 = i0, done1 = i1;
            }
            std::memcpy(out + (t * height + y) * width, line.data(), width * sizeof(T));
          }
        }
      });
    }
  });
  return grad;
}

}  // namespace

// -> loss (), gradient of the loss with respect to the student's pooled vectors (B, R, C)
std::tuple<Tensor, Tensor> region_loss(const Tensor& student, const Tensor& teacher, int64_t rows, int64_t cols) {
  const Tensor ours = pool(student, rows, cols), theirs = pool(teacher, rows, cols);
  const int64_t batch = ours.size(0), regions = rows * cols, channels = ours.size(2), other = theirs.size(2);
  // float64 where either is; both pools are brought to one type
  const bool wide = ours.scalar_type() == ScalarType::Double || theirs.scalar_type() == ScalarType::Double;
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor a = torch::stable::to(ours, type), b = torch::stable::to(theirs, type);
  Tensor loss = torch::stable::new_empty(a, {}, type), grad = torch::stable::new_empty(a, {batch, regions, channels}, type);
  dispatch(type, [&](auto tag) {
    using acc_t = acc_of<decltype(tag)>;
    std::vector<double> losses(batch, 0.0);
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<acc_t> unit(regions * channels), unit_t(regions * other), inverse(regions), inverse_t(regions), dm(regions);
      for (int64_t n = begin; n < end; ++n) {
        normalize(static_cast<const acc_t*>(a.const_data_ptr()) + n * regions * channels, unit.data(), inverse.data(), regions, channels);
        normalize(static_cast<const acc_t*>(b.const_data_ptr()) + n * regions * other, unit_t.data(), inverse_t.data(), regions, other);
        acc_t* out = static_cast<acc_t*>(grad.mutable_data_ptr()) + n * regions * channels;
        for (int64_t i = 0; i < regions; ++i) {
          for (int64_t j = 0; j < regions; ++j) {
            const acc_t m = dot(&unit[i * channels], &unit[j * channels], channels);
            const acc_t m_t = dot(&unit_t[i * other], &unit_t[j * other], other);
            losses[n] += double(m - m_t) * double(m - m_t);
            dm[j] = loss_gradient(m, m_t, batch, regions);
          }
          vector_gradient(dm.data(), unit.data(), inverse.data(), out + i * channels, i, regions, channels);
        }
      }
    });
    double sum = 0;
    for (double l : losses) sum += l;
    *static_cast<acc_t*>(loss.mutable_data_ptr()) = acc_t(sum / (double(std::max<int64_t>(batch, 1)) * double(regions) * double(regions)));
  });
  return {loss, grad};
}

Tensor region_loss_backward(const Tensor& grad_loss, const Tensor& grad_pooled, int64_t height, int64_t width, int64_t rows,
                            int64_t cols, ScalarType dtype, bool channels_last) {
  double scale = 0;
  dispatch(grad_loss.scalar_type(), [&](auto tag) {
    scale = static_cast<double>(*static_cast<const decltype(tag)*>(grad_loss.const_data_ptr()));
  });
  return unpool(torch::stable::to(grad_pooled, acc_type(dtype)), scale, height, width, rows, cols, dtype, channels_last);
}

// -> correlation (B, R, R), pooled vectors (B, R, C)
std::tuple<Tensor, Tensor> pooled_correlation(const Tensor& feat, int64_t rows, int64_t cols) {
  Tensor pooled = pool(feat, rows, cols);
  const int64_t batch = pooled.size(0), regions = rows * cols, channels = pooled.size(2);
  Tensor correlation = torch::stable::new_empty(pooled, {batch, regions, regions});
  dispatch(pooled.scalar_type(), [&](auto tag) {
    using acc_t = acc_of<decltype(tag)>;
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<acc_t> unit(regions * channels), inverse(regions);
      for (int64_t n = begin; n < end; ++n) {
        normalize(static_cast<const acc_t*>(pooled.const_data_ptr()) + n * regions * channels, unit.data(), inverse.data(), regions, channels);
        acc_t* m = static_cast<acc_t*>(correlation.mutable_data_ptr()) + n * regions * regions;
        for (int64_t i = 0; i < regions; ++i)
          for (int64_t j = 0; j < regions; ++j)
            m[i * regions + j] = dot(&unit[i * channels], &unit[j * channels], channels);
      }
    });
  });
  return {correlation, pooled};
}

Tensor pooled_correlation_backward(const Tensor& grad, const Tensor& pooled, int64_t height, int64_t width, int64_t rows,
                                   int64_t cols, ScalarType dtype, bool channels_last) {
  const Tensor dense = torch::stable::contiguous(grad);
  const int64_t batch = pooled.size(0), regions = rows * cols, channels = pooled.size(2);
  Tensor grad_pooled = torch::stable::new_empty(pooled, {batch, regions, channels});
  dispatch(pooled.scalar_type(), [&](auto tag) {
    using acc_t = acc_of<decltype(tag)>;
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<acc_t> unit(regions * channels), inverse(regions), dm(regions);
      for (int64_t n = begin; n < end; ++n) {
        normalize(static_cast<const acc_t*>(pooled.const_data_ptr()) + n * regions * channels, unit.data(), inverse.data(), regions, channels);
        const acc_t* g = static_cast<const acc_t*>(dense.const_data_ptr()) + n * regions * regions;
        acc_t* out = static_cast<acc_t*>(grad_pooled.mutable_data_ptr()) + n * regions * channels;
        for (int64_t i = 0; i < regions; ++i) {
          for (int64_t j = 0; j < regions; ++j) dm[j] = g[i * regions + j] + g[j * regions + i];
          vector_gradient(dm.data(), unit.data(), inverse.data(), out + i * channels, i, regions, channels);
        }
      }
    });
  });
  return unpool(grad_pooled, 1.0, height, width, rows, cols, dtype, channels_last);
}

}  // namespace mgd

STABLE_TORCH_LIBRARY_IMPL(mgd, CPU, m) {
  m.impl("region_loss", TORCH_BOX(&mgd::region_loss));
  m.impl("region_loss_backward", TORCH_BOX(&mgd::region_loss_backward));
  m.impl("pooled_correlation", TORCH_BOX(&mgd::pooled_correlation));
  m.impl("pooled_correlation_backward", TORCH_BOX(&mgd::pooled_correlation_backward));
}
