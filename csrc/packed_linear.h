// The arguments of packed_linear's kernels.
#pragma once

#include <cstdint>

namespace stars {

constexpr int64_t kPanel = 16;  // outputs of a panel: a cache line of fp32, as in stars_kernels/ops/packed_linear.py
constexpr int64_t kPanelsAtOnce = 3;  // at most

template <typename W>
struct PackedLinearArgs {
  int64_t rows, columns, depth;
  const float* x;  // [rows, depth], rows x_row apart
  int64_t x_row;
  const W* weight;    // [ceil(columns / kPanel), depth, kPanel]
  const float* bias;  // [columns] or null
  float* y;           // [rows, columns], rows y_row apart, the first of its columns being y_first
  int64_t y_row, y_first;
};

}  // namespace stars
