// Where the pixels of upsampled logits lie, shared by the CPU and the CUDA kernels.
//
// Notation. Coarse logits are (B, N, h, w), the labels (B, H, W). With aligned corners, full pixel x of `target` lies at
// x (size - 1) / (target - 1) of the `size` coarse pixels of its axis: in cell c, which reaches from coarse pixel c to the
// next, `share` of the way. A last cell holds the pixels that lie on the last coarse pixel. Integers keep this exact.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace mgd {

constexpr int64_t kIgnore = 255;  // the label of pixels that do not count; IGNORE_INDEX of common.py

template <typename acc_t, typename int_t>
struct Place {
  int_t cell;
  acc_t share;  // the weight of coarse pixel cell + 1, and 0 where there is none; that of coarse pixel `cell` is 1 - share
};

template <typename acc_t, typename int_t>
MGD_HD Place<acc_t, int_t> place(int_t x, int_t size, int_t target) {
  if (target == 1) return {int_t(0), acc_t(0)};
  const int_t position = x * (size - 1), cell = position / (target - 1);
  return {cell, acc_t(position - cell * (target - 1)) / acc_t(target - 1)};
}

// Cell c holds the full pixels from cell_begin(c) to cell_begin(c + 1).
template <typename int_t>
MGD_HD int_t cell_begin(int_t cell, int_t size, int_t target) {
  if (cell <= 0) return 0;
  if (cell >= size) return target;
  if (target == 1) return 1;  // the only pixel lies in cell 0
  return (cell * (target - 1) + size - 2) / (size - 1);
}

}  // namespace mgd
