// Attention peaks: a block of query-key products -> its softmax, and the largest that each column gets from one over
// some of the columns, as a logarithm.
#include <algorithm>
#include <cmath>

#include "headwise.h"
#include "rows.h"
#include "vectors.h"

namespace HEADWISE_ISA {
namespace {

using headwise::AttentionPeaks;
using headwise::Range;

// Those columns of a row that are in the range, without the sink.
Logits part_of(const Logits& row, const Range& range) {
  return {row.x + range.start, std::max<int64_t>(0, std::min(row.count, range.stop) - range.start), kNone};
}

// Of the columns in the ranges and the sink; kNone where none is visible.
float log_sum_exp(const Logits& row, const Range* ranges, int64_t count) {
  float top = row.sink;
  for (int64_t i = 0; i < count; i++) top = std::max(top, top_of(part_of(row, ranges[i])));
  if (top == kNone) return kNone;
  float total = exponential(row.sink - top);
  for (int64_t i = 0; i < count; i++) total += exponentials<false>(part_of(row, ranges[i]), top);
  return top + std::log(total);
}

// Raises to from - less where that is more.
void raise(const float* from, float less, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, maximum(load(to + i), load(from + i) - less));
  for (; i < count; i++) to[i] = std::max(to[i], from[i] - less);
}

void attend_rows(const AttentionPeaks& a, int64_t lane, int64_t part) {
  int64_t rows = a.block.rows;
  float* peaks = a.peaks + (part * a.block.lanes + lane) * a.total;
  for (int64_t row = rows * part / a.parts; row < rows * (part + 1) / a.parts; row++) {
    Logits logits = logits_of(a.block, lane, row);
    float lse = log_sum_exp(logits, a.counted, a.ranges);
    if (lse != kNone)
      for (int64_t i = 0; i < a.ranges; i++) {
        Logits counted = part_of(logits, a.counted[i]);
        raise(counted.x, lse, counted.count, peaks + a.counted[i].start);
      }
    Range all = {0, a.block.seen};
    if (a.counted[0].start > 0 || a.counted[0].stop < logits.count) lse = log_sum_exp(logits, &all, 1);
    int64_t visible = lse == kNone ? 0 : logits.count;
    if (visible) exponentials<true>(logits, lse);
    std::fill(logits.x + visible, logits.x + a.block.seen, 0.0f);
  }
}

}  // namespace

void attention_peaks(const AttentionPeaks* args) { over_parts(args, attend_rows); }

}  // namespace HEADWISE_ISA
