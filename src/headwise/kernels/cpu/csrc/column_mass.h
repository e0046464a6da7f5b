// Column mass: exponentials of some rows -> added up by column with a weight each, in total and inside each band.
#pragma once
#include <algorithm>

#include "headwise.h"
#include "vectors.h"

namespace HEADWISE_ISA {
namespace {

inline void add_scaled(const float* from, float factor, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(to + i) + load(from + i) * factor);
  for (; i < count; i++) to[i] += from[i] * factor;
}

// Adds columns first..end of rows that lie `stride` apart, each times its factor.
inline void add_rows(const float* from, int64_t stride, const float* factors, int64_t rows, int64_t first, int64_t end,
                     float* to) {
  int64_t i = first;
  // Four rows at a time: the sums are read and written once for all of them.
  for (int64_t row = 0; row < rows; row += 4) {
    int64_t some = std::min<int64_t>(4, rows - row);
    const float *x = from + row * stride, *factor = factors + row;
    if (some < 4) {
      for (int64_t r = 0; r < some; r++) add_scaled(x + r * stride + first, factor[r], end - first, to + first);
      continue;
    }
    for (i = first; i + kWidth <= end; i += kWidth)
      store(to + i, load(to + i) + (load(x + i) * factor[0] + load(x + stride + i) * factor[1]) +
                        (load(x + 2 * stride + i) * factor[2] + load(x + 3 * stride + i) * factor[3]));
    for (; i < end; i++)
      for (int64_t r = 0; r < 4; r++) to[i] += x[r * stride + i] * factor[r];
  }
}

// The first of `seen` columns that is less than `width` positions behind `position`; positions never fall.
inline int64_t first_within(const int64_t* positions, int64_t seen, int64_t position, int64_t width) {
  return std::upper_bound(positions, positions + seen, position - width) - positions;
}

// Adds what lies inside a band of that width. Rows ascend, so that from where the last one's band begins on, all count.
inline void add_band(const float* from, int64_t stride, const float* factors, const int64_t* own, int64_t rows,
                     int64_t seen, const int64_t* positions, int64_t width, float* to) {
  int64_t all = first_within(positions, seen, positions[own[rows - 1]], width);
  for (int64_t row = 0; row < rows; row++) {
    int64_t first = first_within(positions, seen, positions[own[row]], width);
    if (first < all) add_scaled(from + row * stride + first, factors[row], all - first, to + first);
  }
  add_rows(from, stride, factors, rows, all, seen, to);
}

}  // namespace
}  // namespace HEADWISE_ISA
