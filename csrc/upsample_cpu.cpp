// CPU kernels of the ops on upsampled logits. The schemas are defined in mgd_ops.py; here they get an implementation for the
// CPU.
//
// The full-size logits (B, N, H, W) never exist. A thread walks down some rows of cells of an image and keeps the two coarse
// rows around it, brought to full width; strips of kWidth full pixels are interpolated between them, and all that concerns a
// strip happens while it is in the processor's first cache. The gradient takes the same way back: it is added to two rows of
// full width, which are brought to coarse width when the walk has passed them. Reads the coarse logits and the labels once,
// and writes a few numbers (forward), the coarse gradient (backward) or labels (argmax). Results do not depend on the number
// of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "checks.h"
#include "dtypes.h"
#include "line.h"
#include "upsample_math.h"

namespace mgd {
namespace {

constexpr int64_t kWidth = 32;     // full pixels of a strip
constexpr int64_t kTaskRows = 64;  // full rows, about, that a thread takes at a time

// exp(x) for x <= 0, to 1e-7 of its value above exp(-87), and 0 below. Unlike std::exp it becomes vector
// instructions: 2^n times the Taylor series of exp(x - n ln 2), |x - n ln 2| < 0.35, with n from adding and taking away a
// number whose last place counts ones.
inline float exp_below(float x) {
  constexpr float kOnes = 12582912.0f;  // 1.5 * 2^23
  const bool vanishes = x < -87.0f;
  x = vanishes ? -87.0f : x;
  const float shifted = x * 1.44269504f + kOnes, n = shifted - kOnes;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts; the product with the first is exact
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + (127u << 23);  // the exponent n
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return vanishes ? 0.0f : sum * power;
}
inline double exp_below(double x) { return std::exp(x); }

// A logit `share` of the way from a to b. Where b has no weight it is not looked at, as it may not be finite.
template <typename acc_t>
inline acc_t between(acc_t a, acc_t b, acc_t share) {
  return share > 0 ? (acc_t(1) - share) * a + share * b : a;
}

// One axis: the cells' first pixels, and the place of each full pixel, with some more up to whole strips.
template <typename acc_t>
struct Axis {
  int64_t size, target, strips;
  std::vector<int64_t> begin;  // (size + 1)
  std::vector<int32_t> cell;
  std::vector<acc_t> share;

  Axis(int64_t size, int64_t target) : size(size), target(target), strips((target + kWidth - 1) / kWidth) {
    for (int64_t c = 0; c <= size; ++c) begin.push_back(cell_begin(c, size, target));
    for (int64_t x = 0; x < strips * kWidth; ++x) {
      const Place<acc_t, int64_t> p = place<acc_t, int64_t>(std::min(x, target - 1), size, target);
      cell.push_back(int32_t(p.cell)), share.push_back(p.share);
    }
  }
};

// A walk down the full rows of one image after another. Rows of full width are (strips, N, kWidth).
template <typename T>
class Walk {
 public:
  using acc_t = acc_of<T>;

  Walk(const T* logits, Strides strides, int64_t classes, const Axis<acc_t>& down, const Axis<acc_t>& across)
      : logits_(logits), strides_(strides), classes_(classes), down_(down), across_(across),
        rows_{Line<acc_t>(across.strips * classes * kWidth), Line<acc_t>(across.strips * classes * kWidth)},
        coarse_(across.size + 1), tile_(classes * kWidth), top_(kWidth), sum_(kWidth) {}

  void start(int64_t image) { image_ = image, held_[0] = held_[1] = -1; }

  // Calls f(y, strip) for every strip of the full rows between the coarse rows `cell` and cell + 1.
  template <typename F>
  void visit(int64_t cell, F&& f) {
    if (down_.begin[cell] == down_.begin[cell + 1]) return;
    for (int64_t r = cell; r <= std::min(cell + 1, down_.size - 1); ++r)
      if (held_[r % 2] != r) hold(r);
    for (int64_t y = down_.begin[cell]; y < down_.begin[cell + 1]; ++y)
      for (int64_t strip = 0; strip < across_.strips; ++strip) f(y, strip);
  }

  // Interpolates that strip into tile (N, kWidth); top (kWidth) is the largest logit of each pixel, or nan where there is one.
  void interpolate(int64_t y, int64_t strip) {
    const int64_t cell = down_.cell[y], n = classes_ * kWidth;
    const acc_t share = down_.share[y];
    const acc_t* __restrict__ above = rows_[cell % 2].data() + strip * n;
    const acc_t* __restrict__ below = rows_[(cell + 1) % 2].data() + strip * n;
    acc_t* __restrict__ tile = tile_.data();
    acc_t* __restrict__ top = top_.data();
    std::fill(top, top + kWidth, -std::numeric_limits<acc_t>::infinity());
    for (int64_t i = 0; i < n; i += kWidth)
      for (int64_t p = 0; p < kWidth; ++p) {
        const acc_t t = between(above[i + p], below[i + p], share);
        tile[i + p] = t;
        top[p] = t > top[p] ? t : top[p];
      }
    odd_ = odd_rows_[cell % 2] || (share > 0 && odd_rows_[(cell + 1) % 2]);
    if (!odd_) return;
    for (int64_t i = 0; i < n; i += kWidth)
      for (int64_t p = 0; p < kWidth; ++p)
        if (tile[i + p] != tile[i + p]) top[p] = tile[i + p];
  }

  // winner (kWidth): the first class of the largest logit of each pixel, as in torch.argmax.
  void argmax(int32_t* __restrict__ winner) const {
    const acc_t* __restrict__ tile = tile_.data();
    const acc_t* __restrict__ top = top_.data();
    std::fill(winner, winner + kWidth, 0);
    for (int32_t n = int32_t(classes_) - 1; n >= 0; --n)  // downwards, so that the first of equals stays
      for (int64_t p = 0; p < kWidth; ++p) winner[p] = tile[n * kWidth + p] == top[p] ? n : winner[p];
    if (!odd_) return;
    for (int32_t n = int32_t(classes_) - 1; n >= 0; --n)
      for (int64_t p = 0; p < kWidth; ++p)
        if (tile[n * kWidth + p] != tile[n * kWidth + p]) winner[p] = n;
  }

  // sum (kWidth) of exp(tile - top) over the classes; with kKeep these stay in tile.
  template <bool kKeep>
  void exponentiate() {
    acc_t* __restrict__ tile = tile_.data();
    acc_t* __restrict__ sum = sum_.data();
    const acc_t* __restrict__ top = top_.data();
    std::fill(sum, sum + kWidth, acc_t(0));
    for (int64_t i = 0; i < classes_ * kWidth; i += kWidth)
      for (int64_t p = 0; p < kWidth; ++p) {
        const acc_t e = exp_below(tile[i + p] - top[p]);
        if (kKeep) tile[i + p] = e;
        sum[p] += e;
      }
  }

  acc_t* tile() { return tile_.data(); }
  acc_t* top() { return top_.data(); }
  acc_t* sum() { return sum_.data(); }

 private:
  void hold(int64_t r) {
    const T* in = logits_ + image_ * strides_.b + r * strides_.h;
    const int32_t* __restrict__ cell = across_.cell.data();
    const acc_t* __restrict__ share = across_.share.data();
    acc_t sum = 0;  // of x - x, which is nan where a logit is not finite
    for (int64_t n = 0; n < classes_; ++n, in += strides_.c) {
      acc_t* __restrict__ coarse = coarse_.data();
      for (int64_t j = 0; j < across_.size; ++j) coarse[j] = static_cast<acc_t>(in[j * strides_.w]);
      for (int64_t j = 0; j < across_.size; ++j) sum += coarse[j] - coarse[j];
      coarse[across_.size] = coarse[across_.size - 1];
      for (int64_t s = 0; s < across_.strips; ++s) {
        acc_t* __restrict__ out = rows_[r % 2].data() + (s * classes_ + n) * kWidth;
        for (int64_t p = 0; p < kWidth; ++p) {
          const int64_t x = s * kWidth + p;
          out[p] = between(coarse[cell[x]], coarse[cell[x] + 1], share[x]);
        }
      }
    }
    held_[r % 2] = r, odd_rows_[r % 2] = sum != 0;
  }

  const T* logits_;
  Strides strides_;
  int64_t classes_;
  const Axis<acc_t>& down_;
  const Axis<acc_t>& across_;
  int64_t image_ = 0, held_[2] = {-1, -1};  // the coarse rows that rows_ hold
  bool odd_rows_[2] = {}, odd_ = false;     // whether those, and tile, hold logits that are not finite
  Line<acc_t> rows_[2];                     // coarse row r, at full width, is rows_[r % 2]
  Line<acc_t> coarse_, tile_, top_, sum_;
};

// The gradient of the coarse rows around a walk, at full width, (strips, N, kWidth) each.
template <typename T>
class Back {
 public:
  using acc_t = acc_of<T>;

  Back(T* grad, Strides strides, int64_t classes, const Axis<acc_t>& across)
      : grad_(grad), strides_(strides), classes_(classes), size_(across.strips * classes * kWidth), across_(across),
        rows_{Line<acc_t>(size_), Line<acc_t>(size_)}, line_(across.strips * kWidth) {}

  acc_t* strip(int64_t row, int64_t strip) { return rows_[row % 2].data() + strip * classes_ * kWidth; }

  void clear(int64_t row) { std::fill(rows_[row % 2].data(), rows_[row % 2].data() + size_, acc_t(0)); }

  // Writes the gradient of coarse row r, each pixel gathering from the two cells it is a corner of.
  void write(int64_t image, int64_t r) {
    const int64_t* begin = across_.begin.data();
    const acc_t* share = across_.share.data();
    T* out = grad_ + image * strides_.b + r * strides_.h;
    for (int64_t n = 0; n < classes_; ++n, out += strides_.c) {
      acc_t* line = line_.data();
      for (int64_t s = 0; s < across_.strips; ++s) std::copy_n(strip(r, s) + n * kWidth, kWidth, line + s * kWidth);
      for (int64_t j = 0; j < across_.size; ++j) {
        acc_t before = 0, after = 0;
        for (int64_t x = begin[std::max<int64_t>(j - 1, 0)]; x < begin[j]; ++x) before += share[x] * line[x];
        for (int64_t x = begin[j]; x < begin[j + 1]; ++x) after += (acc_t(1) - share[x]) * line[x];
        out[j * strides_.w] = static_cast<T>(before + after);
      }
    }
  }

 private:
  T* grad_;
  Strides strides_;
  int64_t classes_, size_;
  const Axis<acc_t>& across_;
  Line<acc_t> rows_[2], line_;
};

// What a thread takes at a time: `cells` rows of cells of one image.
struct Tasks {
  int64_t rows, cells, per_image, count;

  Tasks(int64_t batch, int64_t rows, int64_t target)
      : rows(rows), cells(std::clamp<int64_t>(kTaskRows * rows / target, 4, rows < 4 ? 4 : rows)),
        per_image((rows + cells - 1) / cells), count(batch * per_image) {}
  int64_t image(int64_t task) const { return task / per_image; }
  int64_t first(int64_t task) const { return task % per_image * cells; }
  int64_t last(int64_t task) const { return std::min(first(task) + cells, rows); }
};

Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// K label maps (B, H, W), and a look at the strips of them.
class Labels {
 public:
  Labels(const std::vector<Tensor>& maps, int64_t classes)
      : height_(maps[0].size(1)), width_(maps[0].size(2)), classes_(classes) {
    for (const Tensor& map : maps) maps_.push_back(torch::stable::contiguous(map));
    for (const Tensor& map : maps_) data_.push_back(static_cast<const int64_t*>(map.const_data_ptr()));
  }
  int64_t maps() const { return maps_.size(); }
  int64_t height() const { return height_; }
  int64_t width() const { return width_; }

  // Whether any map has a class there. A label that is neither a class nor 255 goes to `wrong`, and its strip has none.
  bool look(int64_t image, int64_t y, int64_t strip, int64_t& wrong) {
    offset_ = (image * height_ + y) * width_ + strip * kWidth, count_ = std::min(kWidth, width_ - strip * kWidth);
    bool any = false;
    for (const int64_t* map : data_) {
      int64_t valid = 0, unknown = 0;  // sums without branches, which become vector instructions
      for (int64_t p = offset_; p < offset_ + count_; ++p) {
        valid += map[p] != kIgnore;
        unknown += (map[p] != kIgnore) & ((map[p] < 0) | (map[p] >= classes_));
      }
      any |= valid > 0;
      if (unknown == 0) continue;
      for (int64_t p = offset_; p < offset_ + count_; ++p)
        if (map[p] != kIgnore && (map[p] < 0 || map[p] >= classes_)) wrong = map[p];
      return false;
    }
    return any;
  }

  // Calls f(pixel of the strip, its class) for the pixels of map k that have one, in the strip that was looked at.
  template <typename F>
  void each(int64_t k, F&& f) const {
    for (int64_t p = 0; p < count_; ++p)
      if (const int64_t label = data_[k][offset_ + p]; label != kIgnore) f(p, label);
  }

 private:
  int64_t height_, width_, classes_, offset_ = 0, count_ = 0;
  std::vector<Tensor> maps_;
  std::vector<const int64_t*> data_;
};

void check_classes(const std::vector<int64_t>& wrong, int64_t classes) {
  for (int64_t label : wrong)
    STD_TORCH_CHECK(label == kIgnore, "mgd: a label is ", label, ", and neither 255 nor one of ", classes, " classes");
}

}  // namespace

// -> the sum of the cross entropies against each of K label maps (K)
Tensor upsampled_cross_entropy(const Tensor& logits, std::vector<Tensor> maps) {
  check_labels(logits, maps);
  const int64_t batch = logits.size(0), classes = logits.size(1), count = maps.size();
  const Labels all(maps, classes);
  Tensor sums = torch::stable::new_empty(logits, {count}, acc_type(logits.scalar_type()));
  dispatch(logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using acc_t = acc_of<T>;
    const Axis<acc_t> down(logits.size(2), all.height()), across(logits.size(3), all.width());
    const Tasks tasks(batch, down.size, down.target);
    std::vector<double> parts(tasks.count * count, 0.0);
    std::vector<int64_t> wrong(tasks.count, kIgnore);
    torch::stable::parallel_for(0, tasks.count, 1, [&](int64_t begin, int64_t end) {
      Walk<T> walk(static_cast<const T*>(logits.const_data_ptr()), strides_of(logits), classes, down, across);
      Labels labels = all;
      for (int64_t task = begin; task < end; ++task) {
        walk.start(tasks.image(task));
        for (int64_t cell = tasks.first(task); cell < tasks.last(task); ++cell)
          walk.visit(cell, [&](int64_t y, int64_t strip) {
            if (!labels.look(tasks.image(task), y, strip, wrong[task])) return;
            walk.interpolate(y, strip);
            walk.template exponentiate<false>();
            for (int64_t k = 0; k < count; ++k) {
              double product = 1, rest = 0;  // the sum of logarithms is that of the product, which is at most N^kWidth
              labels.each(k, [&](int64_t p, int64_t label) {
                product *= double(walk.sum()[p]);
                rest += double(walk.top()[p] - walk.tile()[label * kWidth + p]);
              });
              parts[task * count + k] += std::log(product) + rest;
            }
          });
      }
    });
    check_classes(wrong, classes);
    for (int64_t k = 0; k < count; ++k) {
      double sum = 0;
      for (int64_t task = 0; task < tasks.count; ++task) sum += parts[task * count + k];
      static_cast<acc_t*>(sums.mutable_data_ptr())[k] = acc_t(sum);
    }
  });
  return sums;
}

// The gradient with respect to the logits, from that of the sums (K). A task writes the coarse rows of its cells, which
// gather from these cells and from those above its first row: the full rows there are computed twice, in 1 of 16 rows of
// cells at four times the size, and nothing has to be added up across threads.
Tensor upsampled_cross_entropy_backward(const Tensor& grad_sums, const Tensor& logits, std::vector<Tensor> maps) {
  check_sums(grad_sums, logits, maps);
  const int64_t batch = logits.size(0), classes = logits.size(1), count = maps.size();
  const Labels all(maps, classes);
  const Tensor scales = dense(grad_sums, acc_type(logits.scalar_type()));
  Tensor grad = empty_gradient(logits);
  dispatch(logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using acc_t = acc_of<T>;
    const acc_t* scale = static_cast<const acc_t*>(scales.const_data_ptr());
    const Axis<acc_t> down(logits.size(2), all.height()), across(logits.size(3), all.width());
    const Tasks tasks(batch, down.size, down.target);
    std::vector<int64_t> wrong(tasks.count, kIgnore);
    torch::stable::parallel_for(0, tasks.count, 1, [&](int64_t begin, int64_t end) {
      Walk<T> walk(static_cast<const T*>(logits.const_data_ptr()), strides_of(logits), classes, down, across);
      Back<T> back(static_cast<T*>(grad.mutable_data_ptr()), strides_of(grad), classes, across);
      Labels labels = all;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = tasks.image(task), first = tasks.first(task);
        walk.start(image);
        back.clear(0), back.clear(1);
        for (int64_t cell = std::max<int64_t>(first - 1, 0); cell < tasks.last(task); ++cell) {
          walk.visit(cell, [&](int64_t y, int64_t strip) {
            const acc_t share = down.share[y];
            if (cell < first && share == 0) return;
            if (!labels.look(image, y, strip, wrong[task])) return;
            walk.interpolate(y, strip);
            walk.template exponentiate<true>();
            // A pixel's gradient is sum_k scale_k (softmax - one hot) over the maps in which it has a class; the difference
            // is taken before anything is added up, since it is small where the network is right.
            acc_t weight[kWidth] = {};
            for (int64_t k = 0; k < count; ++k) labels.each(k, [&](int64_t p, int64_t) { weight[p] += scale[k]; });
            acc_t* __restrict__ tile = walk.tile();
            for (int64_t p = 0; p < kWidth; ++p) weight[p] /= walk.sum()[p];
            for (int64_t i = 0; i < classes * kWidth; i += kWidth)
              for (int64_t p = 0; p < kWidth; ++p) tile[i + p] *= weight[p];
            for (int64_t k = 0; k < count; ++k)
              labels.each(k, [&](int64_t p, int64_t label) { tile[label * kWidth + p] -= scale[k]; });
            acc_t* __restrict__ above = back.strip(cell, strip);
            acc_t* __restrict__ below = back.strip(cell + 1, strip);
            for (int64_t i = 0; i < classes * kWidth; ++i) {
              above[i] += (acc_t(1) - share) * tile[i];
              below[i] += share * tile[i];
            }
          });
          if (cell >= first) back.write(image, cell);
          back.clear(cell);
        }
      }
    });
    check_classes(wrong, classes);
  });
  return grad;
}

// -> the class of the largest logit of each full pixel (B, H, W), 255 where its probability is below the threshold
Tensor upsampled_argmax(const Tensor& logits, int64_t height, int64_t width, double threshold) {
  check_size(logits, height, width);
  const int64_t batch = logits.size(0), classes = logits.size(1);
  Tensor labels = torch::stable::new_empty(logits, {batch, height, width}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(labels.mutable_data_ptr());
  dispatch(logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using acc_t = acc_of<T>;
    const Axis<acc_t> down(logits.size(2), height), across(logits.size(3), width);
    const Tasks tasks(batch, down.size, down.target);
    torch::stable::parallel_for(0, tasks.count, 1, [&](int64_t begin, int64_t end) {
      Walk<T> walk(static_cast<const T*>(logits.const_data_ptr()), strides_of(logits), classes, down, across);
      for (int64_t task = begin; task < end; ++task) {
        walk.start(tasks.image(task));
        for (int64_t cell = tasks.first(task); cell < tasks.last(task); ++cell)
          walk.visit(cell, [&](int64_t y, int64_t strip) {
            walk.interpolate(y, strip);
            int32_t winner[kWidth];
            walk.argmax(winner);
            if (threshold > 0) {
              walk.template exponentiate<false>();
              for (int64_t p = 0; p < kWidth; ++p)
                if (acc_t(1) / walk.sum()[p] < acc_t(threshold)) winner[p] = kIgnore;
            }
            std::copy_n(winner, std::min(kWidth, width - strip * kWidth),
                        out + (tasks.image(task) * height + y) * width + strip * kWidth);
          });
      }
    });
  });
  return labels;
}

}  // namespace mgd

STABLE_TORCH_LIBRARY_IMPL(mgd, CPU, m) {
  m.impl("upsampled_cross_entropy", TORCH_BOX(&mgd::upsampled_cross_entropy));
  m.impl("upsampled_cross_entropy_backward", TORCH_BOX(&mgd::upsampled_cross_entropy_backward));
  m.impl("upsampled_argmax", TORCH_BOX(&mgd::upsampled_argmax));
}
