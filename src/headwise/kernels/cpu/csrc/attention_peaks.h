// Attention peaks: logits of a row -> the largest that each column gets from a softmax over some of them, as a log.
#pragma once
#include <algorithm>
#include <cmath>

#include "headwise.h"
#include "rows.h"
#include "vectors.h"

namespace HEADWISE_ISA {
namespace {

using headwise::Range;

// Those columns of a row that are in the range, without the sink.
inline Logits part_of(const Logits& row, const Range& range) {
  return {row.x + range.start, std::max<int64_t>(0, std::min(row.count, range.stop) - range.start), kNone};
}

// Of the columns in the ranges and the sink; kNone where none is visible.
inline float log_sum_exp(const Logits& row, const Range* ranges, int64_t count) {
  float top = row.sink;
  for (int64_t i = 0; i < count; i++) top = std::max(top, top_of(part_of(row, ranges[i])));
  if (top == kNone) return kNone;
  float total = exponential(row.sink - top);
  for (int64_t i = 0; i < count; i++) total += exponentials<false>(part_of(row, ranges[i]), top);
  return top + std::log(total);
}

// Raises `peaks`, of all columns, where this row gives more.
inline void raise_peaks(const Logits& row, const Range* ranges, int64_t count, float* peaks) {
  float lse = log_sum_exp(row, ranges, count);
  if (lse == kNone) return;
  for (int64_t range = 0; range < count; range++) {
    Logits part = part_of(row, ranges[range]);
    float* to = peaks + ranges[range].start;
    int64_t i = 0;
    for (; i + kWidth <= part.count; i += kWidth) store(to + i, maximum(load(to + i), load(part.x + i) - lse));
    for (; i < part.count; i++) to[i] = std::max(to[i], part.x[i] - lse);
  }
}

}  // namespace
}  // namespace HEADWISE_ISA
