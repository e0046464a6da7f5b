// Rows: the products of one query row with the keys it sees -> its logits, and the sum of their exponentials.
//
// The products of a block stay near the processor while its rows are worked on.
#pragma once
#include <algorithm>

#include "headwise.h"
#include "vectors.h"

namespace HEADWISE_ISA {
namespace {

// Of one query row; kNone where a column is hidden.
struct Logits {
  float* x;
  int64_t count;  // columns from the first on; what is behind them is hidden
  float sink;
};

Logits logits_of(const headwise::Block& block, int64_t lane, int64_t row) {
  float* x = block.products + (lane * block.rows + row) * block.seen;
  int64_t count = block.mask ? block.seen : block.own[row] + 1;
  if (block.mask) {
    const bool* visible = block.mask + row * block.mask_stride;
    for (int64_t i = 0; i < count; i++) x[i] = visible[i] ? x[i] : kNone;
  }
  if (block.softcap > 0) {
    float softcap = block.softcap;
    int64_t whole = count / kWidth * kWidth;
    for (int64_t i = 0; i < whole; i += kWidth) {
      // A hidden column stays hidden: the cap would bring it back.
      Vec capped = tangent(load(x + i) / softcap) * softcap;
      store(x + i, load(x + i) == kNone ? broadcast(kNone) : capped);
    }
    for (int64_t i = whole; i < count; i++)
      if (x[i] != kNone) x[i] = tangent(broadcast(x[i] / softcap))[0] * softcap;
  }
  float gate = block.marks ? block.gates[lane * block.rows + row] : 0;
  if (gate != 0) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(x + i, load(x + i) + load(block.marks + i) * gate);
    for (; i < count; i++) x[i] += block.marks[i] * gate;
  }
  return {x, count, block.sinks ? block.sinks[lane] : kNone};
}

// The largest logit, the sink's included; kNone where nothing is visible.
float top_of(const Logits& row) {
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

// Calls `body` with every lane and each of its parts, on all threads.
template <typename Args>
void over_parts(const Args* args, void (*body)(const Args&, int64_t lane, int64_t part)) {
  struct Context {
    const Args* args;
    void (*body)(const Args&, int64_t, int64_t);
  } context = {args, body};
  args->parallel_for(
      0, args->block.lanes * args->parts, 1,
      [](int64_t begin, int64_t end, void* c) {
        const auto& [args, body] = *static_cast<Context*>(c);
        for (int64_t i = begin; i < end; i++) body(*args, i / args->parts, i % args->parts);
      },
      &context);
}

}  // namespace
}  // namespace HEADWISE_ISA
