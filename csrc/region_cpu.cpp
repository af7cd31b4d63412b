// CPU kernels of the region ops. The schemas are defined in mgd_ops.py; here they get an implementation for the CPU.
//
// Each feature map is read once, in its own memory order, and the gradient is written once; what lies between works on the
// pooled (B, R, C) tensor, under 1% of the features. Results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "dtypes.h"
#include "line.h"
#include "region_math.h"

namespace mgd {
namespace {

// The bins of one axis, computed once a call: divisions are dear beside the few additions a pixel needs.
struct Axis {
  struct Run {  // neighbours that lie in the same bins
    int64_t begin, end, first, last;
  };
  int64_t size, count;
  std::vector<int64_t> begin, end;  // of each bin
  std::vector<Run> runs;

  Axis(int64_t size, int64_t count) : size(size), count(count) {
    for (int64_t i = 0; i < count; ++i) begin.push_back(bin_begin(i, size, count)), end.push_back(bin_end(i, size, count));
    for (int64_t x = 0; x < size; ++x) {
      const int64_t first = first_bin(x, size, count), last = last_bin(x, size, count);
      if (x > 0 && first == runs.back().first && last == runs.back().last) runs.back().end = x + 1;
      else runs.push_back({x, x + 1, first, last});
    }
  }
};

// (R): the weight of a pixel in the average of each region.
template <typename acc_t>
std::vector<acc_t> pixel_weights(const Axis& vertical, const Axis& horizontal) {
  std::vector<acc_t> weights;
  for (int64_t i = 0; i < vertical.count; ++i)
    for (int64_t j = 0; j < horizontal.count; ++j)
      weights.push_back(pixel_weight<acc_t>(i, j, vertical.size, horizontal.size, vertical.count, horizontal.count));
  return weights;
}

// sum[k] += the k-th values, `step` apart, of `rows` rows that lie `stride` apart; n values a row.
//
// With a unit step, four rows at once load and store the sums a quarter as often, and the lines of the rows after the next
// four are asked for ahead, since the processor's own prefetching loses track of short rows (together 20% to 30% faster).
template <typename T, typename acc_t>
void add_rows(acc_t* __restrict__ sum, const T* __restrict__ p, int64_t rows, int64_t stride, int64_t n, int64_t step) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const auto four = [&](int64_t k) {
    return (static_cast<acc_t>(p[k]) + static_cast<acc_t>(p[k + stride])) +
           (static_cast<acc_t>(p[k + 2 * stride]) + static_cast<acc_t>(p[k + 3 * stride]));
  };
  if (step == 1)
    for (; rows >= 4; rows -= 4, p += 4 * stride) {
      int64_t k = 0;
      for (; k + kLine <= n; k += kLine) {
        for (int64_t row = 8; row < 12; ++row) __builtin_prefetch(p + row * stride + k);
        for (int64_t l = k; l < k + kLine; ++l) sum[l] += four(l);
      }
      for (; k < n; ++k) sum[k] += four(k);
    }
  for (; rows > 0; --rows, p += stride) {
    if (step == 1)
      for (int64_t k = 0; k < n; ++k) sum[k] += static_cast<acc_t>(p[k]);
    else
      for (int64_t k = 0; k < n; ++k) sum[k] += static_cast<acc_t>(p[k * step]);
  }
}

// Pool one channel plane: column sums of each row bin first, with whole rows as vectors, then their bins.
template <typename T, typename acc_t>
void pool_plane(const T* plane, acc_t* pooled, Strides s, int64_t channels, const Axis& vertical, const Axis& horizontal,
                const acc_t* weights, acc_t* columns) {
  const int64_t cols = horizontal.count;
  for (int64_t i = 0; i < vertical.count; ++i) {
    std::fill(columns, columns + horizontal.size, acc_t(0));
    add_rows(columns, plane + vertical.begin[i] * s.h, vertical.end[i] - vertical.begin[i], s.h, horizontal.size, s.w);
    for (int64_t j = 0; j < cols; ++j) {
      acc_t sums[4] = {};  // four chains of additions, which need not wait for one another
      int64_t x = horizontal.begin[j];
      for (; x + 4 <= horizontal.end[j]; x += 4)
        for (int64_t l = 0; l < 4; ++l) sums[l] += columns[x + l];
      for (int64_t l = 0; x < horizontal.end[j]; ++x, ++l) sums[l] += columns[x];
      pooled[(i * cols + j) * channels] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * weights[i * cols + j];
    }
  }
}

// Pool row i of the regions of an image whose channels lie side by side: whole pixels as vectors.
template <typename T, typename acc_t>
void pool_pixels(const T* image, acc_t* pooled, Strides s, int64_t channels, const Axis& vertical, const Axis& horizontal,
                 const acc_t* weights, int64_t i) {
  const int64_t cols = horizontal.count;
  acc_t* out = pooled + i * cols * channels;
  std::fill(out, out + cols * channels, acc_t(0));
  for (int64_t y = vertical.begin[i]; y < vertical.end[i]; ++y)
    for (int64_t j = 0; j < cols; ++j)
      add_rows(out + j * channels, image + y * s.h + horizontal.begin[j] * s.w, horizontal.end[j] - horizontal.begin[j], s.w,
               channels, int64_t(1));
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t c = 0; c < channels; ++c) out[j * channels + c] *= weights[i * cols + j];
}

// feat (B, C, H, W), any strides -> (B, R, C) averages, float32 or float64.
Tensor pool(const Tensor& feat, int64_t rows, int64_t cols) {
  const int64_t batch = feat.size(0), channels = feat.size(1);
  const Strides s{feat.stride(0), feat.stride(1), feat.stride(2), feat.stride(3)};
  const Axis vertical(feat.size(2), rows), horizontal(feat.size(3), cols);
  Tensor pooled = torch::stable::new_empty(feat, {batch, rows * cols, channels}, acc_type(feat.scalar_type()));
  dispatch(feat.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using acc_t = acc_of<T>;
    const T* in = static_cast<const T*>(feat.const_data_ptr());
    acc_t* out = static_cast<acc_t*>(pooled.mutable_data_ptr());
    const std::vector<acc_t> weights = pixel_weights<acc_t>(vertical, horizontal);
    if (is_channels_last(feat)) {
      torch::stable::parallel_for(0, batch * rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          pool_pixels(in + t / rows * s.b, out + t / rows * rows * cols * channels, s, channels, vertical, horizontal,
                      weights.data(), t % rows);
      });
    } else {
      torch::stable::parallel_for(0, batch * channels, 1, [&](int64_t begin, int64_t end) {
        Line<acc_t> columns(horizontal.size);
        for (int64_t t = begin; t < end; ++t) {
          const int64_t b = t / channels, c = t % channels;
          pool_plane(in + b * s.b + c * s.c, out + b * rows * cols * channels + c, s, channels, vertical, horizontal,
                     weights.data(), columns.data());
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
  for (int64_t l = 0; k < n; ++k, ++l) sums[l] += a[k] * b[k];
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) sums[l] += sums[l + half];
  return sums[0];
}

// unit (R, C) and norms (R) of the pooled vectors of one image.
template <typename acc_t>
void normalize(const acc_t* pooled, acc_t* unit, acc_t* norm, int64_t regions, int64_t channels) {
  for (int64_t i = 0; i < regions; ++i) {
    const acc_t* v = pooled + i * channels;
    norm[i] = norm_of(dot(v, v, channels));
    for (int64_t c = 0; c < channels; ++c) unit[i * channels + c] = v[c] / norm[i];
  }
}

// m (R, R), m_ij = u_i . u_j.
template <typename acc_t>
void correlate(const acc_t* unit, acc_t* m, int64_t regions, int64_t channels) {
  for (int64_t i = 0; i < regions; ++i)
    for (int64_t j = 0; j <= i; ++j)
      m[i * regions + j] = m[j * regions + i] = dot(unit + i * channels, unit + j * channels, channels);
}

// grad (C) of the pooled vector i from the gradients `dm` (R) of row i of m, both places of each pair together.
template <typename acc_t>
void vector_gradient(const acc_t* dm, const acc_t* unit, const acc_t* norm, acc_t* grad, int64_t i, int64_t regions,
                     int64_t channels) {
  constexpr int64_t kBlock = 64;  // channels whose sums stay in registers
  for (int64_t c0 = 0; c0 < channels; c0 += kBlock) {
    acc_t sums[kBlock] = {};
    const int64_t n = std::min(kBlock, channels - c0);
    for (int64_t j = 0; j < regions; ++j) {
      const acc_t g = dm[j];
      const acc_t* u = unit + j * channels + c0;
      if (n == kBlock)
        for (int64_t k = 0; k < kBlock; ++k) sums[k] += g * u[k];
      else
        for (int64_t k = 0; k < n; ++k) sums[k] += g * u[k];
    }
    std::copy(sums, sums + n, grad + c0);
  }
  const acc_t* u = unit + i * channels;
  const acc_t along = dot(grad, u, channels);
  for (int64_t c = 0; c < channels; ++c) grad[c] = normalize_gradient(grad[c], u[c], along, norm[i]);
}

// Scatter the gradient of the pooled vectors (B, R, C), times `scale`, over the pixels; pixels of the same regions share one
// value a channel, so each distinct row is computed once and then copied.
Tensor unpool(const Tensor& grad_pooled, double scale, int64_t height, int64_t width, int64_t rows, int64_t cols,
              ScalarType dtype, bool channels_last) {
  const int64_t batch = grad_pooled.size(0), regions = rows * cols, channels = grad_pooled.size(2);
  const Axis vertical(height, rows), horizontal(width, cols);
  Tensor grad = empty_map(batch, channels, height, width, dtype, grad_pooled.device(), channels_last);
  dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    using acc_t = acc_of<T>;
    const acc_t* in = static_cast<const acc_t*>(grad_pooled.const_data_ptr());
    T* out = static_cast<T*>(grad.mutable_data_ptr());
    std::vector<acc_t> weights = pixel_weights<acc_t>(vertical, horizontal);
    for (acc_t& weight : weights) weight *= acc_t(scale);
    if (channels_last) {
      const int64_t runs = vertical.runs.size();
      torch::stable::parallel_for(0, batch * runs, 1, [&](int64_t begin, int64_t end) {
        Line<T> line(width * channels);
        Line<acc_t> sum(channels);
        for (int64_t t = begin; t < end; ++t) {
          const int64_t b = t / runs;
          const Axis::Run& v = vertical.runs[t % runs];
          for (const Axis::Run& h : horizontal.runs) {
            std::fill(sum.data(), sum.data() + channels, acc_t(0));
            for (int64_t i = v.first; i <= v.last; ++i)
              for (int64_t j = h.first; j <= h.last; ++j) {
                const acc_t weight = weights[i * cols + j];
                const acc_t* g = in + ((b * rows + i) * cols + j) * channels;
                for (int64_t c = 0; c < channels; ++c) sum.data()[c] += weight * g[c];
              }
            T* first = line.data() + h.begin * channels;
            for (int64_t c = 0; c < channels; ++c) first[c] = static_cast<T>(sum.data()[c]);
            for (int64_t x = h.begin + 1; x < h.end; ++x) std::memcpy(line.data() + x * channels, first, channels * sizeof(T));
          }
          for (int64_t y = v.begin; y < v.end; ++y)
            std::memcpy(out + (b * height + y) * width * channels, line.data(), width * channels * sizeof(T));
        }
      });
    } else {
      torch::stable::parallel_for(0, batch * channels, 1, [&](int64_t begin, int64_t end) {
        Line<T> line(width);
        std::vector<acc_t> regional(regions);
        for (int64_t t = begin; t < end; ++t) {
          const acc_t* g = in + t / channels * regions * channels + t % channels;
          for (int64_t r = 0; r < regions; ++r) regional[r] = weights[r] * g[r * channels];
          for (const Axis::Run& v : vertical.runs) {
            for (const Axis::Run& h : horizontal.runs)
              std::fill(line.data() + h.begin, line.data() + h.end,
                        static_cast<T>(gather(regional.data(), v.first, v.last, h.first, h.last, cols, int64_t(1))));
            for (int64_t y = v.begin; y < v.end; ++y)
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
  check_features(student, teacher, rows, cols);
  const Tensor ours = pool(student, rows, cols), theirs = pool(teacher, rows, cols);
  const int64_t batch = ours.size(0), regions = rows * cols, channels = ours.size(2), other = theirs.size(2);
  // float64 where either is; both pools are brought to one type
  const bool wide = ours.scalar_type() == ScalarType::Double || theirs.scalar_type() == ScalarType::Double;
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  const Tensor a = torch::stable::to(ours, type), b = torch::stable::to(theirs, type);
  Tensor loss = torch::stable::new_empty(a, {}, type), grad = torch::stable::new_empty(a, {batch, regions, channels}, type);
  dispatch(type, [&](auto tag) {
    using acc_t = acc_of<decltype(tag)>;
    const acc_t* in = static_cast<const acc_t*>(a.const_data_ptr());
    const acc_t* in_t = static_cast<const acc_t*>(b.const_data_ptr());
    std::vector<double> losses(batch, 0.0);
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<acc_t> unit(regions * std::max(channels, other)), norm(regions);
      std::vector<acc_t> m(regions * regions), m_t(regions * regions), dm(regions);
      for (int64_t n = begin; n < end; ++n) {
        normalize(in_t + n * regions * other, unit.data(), norm.data(), regions, other);
        correlate(unit.data(), m_t.data(), regions, other);
        normalize(in + n * regions * channels, unit.data(), norm.data(), regions, channels);
        correlate(unit.data(), m.data(), regions, channels);
        acc_t* out = static_cast<acc_t*>(grad.mutable_data_ptr()) + n * regions * channels;
        for (int64_t i = 0; i < regions; ++i) {
          for (int64_t j = 0; j < regions; ++j) {
            const acc_t ours = m[i * regions + j], theirs = m_t[i * regions + j];
            losses[n] += double(ours - theirs) * double(ours - theirs);
            dm[j] = loss_gradient(ours, theirs, batch, regions);
          }
          vector_gradient(dm.data(), unit.data(), norm.data(), out + i * channels, i, regions, channels);
        }
      }
    });
    double sum = 0;
    for (double l : losses) sum += l;
    const double entries = double(std::max<int64_t>(batch, 1)) * double(regions) * double(regions);
    *static_cast<acc_t*>(loss.mutable_data_ptr()) = acc_t(sum / entries);
  });
  return {loss, grad};
}

Tensor region_loss_backward(const Tensor& grad_loss, const Tensor& grad_pooled, int64_t height, int64_t width, int64_t rows,
                            int64_t cols, ScalarType dtype, bool channels_last) {
  check_pooled(grad_pooled, height, width, rows, cols, dtype);
  check_device(grad_loss, grad_pooled);
  STD_TORCH_CHECK(grad_loss.dim() == 0, "mgd: the gradient of the loss must be a scalar");
  double scale = 0;
  dispatch(grad_loss.scalar_type(), [&](auto tag) {
    scale = static_cast<double>(*static_cast<const decltype(tag)*>(grad_loss.const_data_ptr()));
  });
  return unpool(dense(grad_pooled, acc_type(dtype)), scale, height, width, rows, cols, dtype, channels_last);
}

// -> correlation (B, R, R), pooled vectors (B, R, C)
std::tuple<Tensor, Tensor> pooled_correlation(const Tensor& feat, int64_t rows, int64_t cols) {
  check_features(feat, feat, rows, cols);
  Tensor pooled = pool(feat, rows, cols);
  const int64_t batch = pooled.size(0), regions = rows * cols, channels = pooled.size(2);
  Tensor correlation = torch::stable::new_empty(pooled, {batch, regions, regions});
  dispatch(pooled.scalar_type(), [&](auto tag) {
    using acc_t = acc_of<decltype(tag)>;
    const acc_t* in = static_cast<const acc_t*>(pooled.const_data_ptr());
    acc_t* out = static_cast<acc_t*>(correlation.mutable_data_ptr());
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<acc_t> unit(regions * channels), norm(regions);
      for (int64_t n = begin; n < end; ++n) {
        normalize(in + n * regions * channels, unit.data(), norm.data(), regions, channels);
        correlate(unit.data(), out + n * regions * regions, regions, channels);
      }
    });
  });
  return {correlation, pooled};
}

Tensor pooled_correlation_backward(const Tensor& grad, const Tensor& pooled, int64_t height, int64_t width, int64_t rows,
                                   int64_t cols, ScalarType dtype, bool channels_last) {
  check_pooled(pooled, height, width, rows, cols, dtype);
  check_correlation(grad, pooled);
  const Tensor g = dense(grad, acc_type(dtype)), p = dense(pooled, acc_type(dtype));
  const int64_t batch = p.size(0), regions = rows * cols, channels = p.size(2);
  Tensor grad_pooled = torch::stable::new_empty(p, {batch, regions, channels});
  dispatch(p.scalar_type(), [&](auto tag) {
    using acc_t = acc_of<decltype(tag)>;
    const acc_t* in = static_cast<const acc_t*>(p.const_data_ptr());
    const acc_t* dense_g = static_cast<const acc_t*>(g.const_data_ptr());
    acc_t* grads = static_cast<acc_t*>(grad_pooled.mutable_data_ptr());
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<acc_t> unit(regions * channels), norm(regions), dm(regions);
      for (int64_t n = begin; n < end; ++n) {
        normalize(in + n * regions * channels, unit.data(), norm.data(), regions, channels);
        const acc_t* g = dense_g + n * regions * regions;
        acc_t* out = grads + n * regions * channels;
        for (int64_t i = 0; i < regions; ++i) {
          for (int64_t j = 0; j < regions; ++j) dm[j] = g[i * regions + j] + g[j * regions + i];
          vector_gradient(dm.data(), unit.data(), norm.data(), out + i * channels, i, regions, channels);
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
