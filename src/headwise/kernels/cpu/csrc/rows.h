// Rows: the products of one query row with the keys it sees -> its logits, and the sum of their exponentials.
//
// The products of a block stay near the processor while its rows are worked on.
#pragma once
#include <algorithm>

#include "tiles.h"
#include "vectors.h"

namespace HEADWISE_ISA {
namespace {

// Of one query row. Behind the columns that it may see up to the next tile stands kNone, as where one is hidden.
struct Logits {
  float* x;
  int64_t count;  // columns from the first on; what is behind them is hidden
  float sink;

  int64_t end() const { return (count + kWidth - 1) / kWidth * kWidth; }
};

// What stands beside the products of a row.
struct Beside {
  const bool* visible;  // [columns], or null
  const float* marks;   // [columns], or null: the gate times it is added to a logit, behind a soft cap
  float gate, softcap;  // softcap 0: none
};

// Products become logits. `room` is a multiple of a tile's columns.
inline void make_logits(const Logits& row, int64_t room, const Beside& beside) {
  float* x = row.x;
  std::fill(x + row.count, x + room, kNone);
  if (beside.visible)
    for (int64_t i = 0; i < row.count; i++) x[i] = beside.visible[i] ? x[i] : kNone;
  if (beside.softcap > 0)
    for (int64_t i = 0; i < row.count; i += kWidth) {
      // A hidden column stays hidden: the cap would bring it back.
      Vec capped = tangent(load(x + i) / beside.softcap) * beside.softcap;
      store(x + i, load(x + i) == kNone ? broadcast(kNone) : capped);
    }
  if (beside.marks && beside.gate != 0) {
    int64_t i = 0;
    for (; i + kWidth <= row.count; i += kWidth) store(x + i, load(x + i) + load(beside.marks + i) * beside.gate);
    for (; i < row.count; i++) x[i] += beside.marks[i] * beside.gate;
  }
}

// The largest logit, the sink's included; kNone where nothing is visible.
inline float top_of(const Logits& row) {
  // Four at a time: each maximum waits for the one before it.
  Vec tops[4] = {broadcast(row.sink), broadcast(row.sink), broadcast(row.sink), broadcast(row.sink)};
  int64_t i = 0, whole = row.count / kWidth * kWidth;
  for (; i + 4 * kWidth <= whole; i += 4 * kWidth)
    for (int64_t k = 0; k < 4; k++) tops[k] = maximum(tops[k], load(row.x + i + k * kWidth));
  for (; i < whole; i += kWidth) tops[0] = maximum(tops[0], load(row.x + i));
  float top = largest(maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3])));
  for (i = whole; i < row.count; i++) top = std::max(top, row.x[i]);
  return top;
}

// The sum of the exponentials relative to `top`, the sink's included; they take the logits' place where `keep`.
template <bool keep>
float exponentials(const Logits& row, float top) {
  int64_t whole = row.count / kWidth * kWidth;
  Vec sums = {};
  for (int64_t i = 0; i < whole; i += kWidth) {
    Vec p = exponential(load(row.x + i) - top);
    sums += p;
    if (keep) store(row.x + i, p);
  }
  float total = sum(sums) + exponential(row.sink - top);
  for (int64_t i = whole; i < row.count; i++) {
    float p = exponential(row.x[i] - top);
    total += p;
    if (keep) row.x[i] = p;
  }
  return total;
}

}  // namespace
}  // namespace HEADWISE_ISA
