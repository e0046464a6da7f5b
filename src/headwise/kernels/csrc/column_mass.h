// Column mass: a block of query-key products -> its softmax, added up by column, in total and inside each band.
//
// The products of a block stay near the processor, where each row is turned into probabilities and added up.
#include <algorithm>

#include "headwise.h"
#include "vectors.h"

namespace HEADWISE_ISA {
namespace {

using headwise::ColumnMass;

// The first column that is less than `width` positions behind `position`; positions never fall.
int64_t first_within(const int64_t* positions, int64_t seen, int64_t position, int64_t width) {
  return std::upper_bound(positions, positions + seen, position - width) - positions;
}

void add_scaled(const float* from, float factor, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(to + i) + load(from + i) * factor);
  for (; i < count; i++) to[i] += from[i] * factor;
}

// Turns logits into exponentials relative to the largest; returns their sum, 0 where nothing is visible.
float exponentials(float* x, int64_t count, float softcap, float sink) {
  float top = sink;
  int64_t whole = count / kWidth * kWidth;
  if (softcap > 0) {
    for (int64_t i = 0; i < whole; i += kWidth) {
      // A hidden column stays hidden: the cap would bring it back.
      Vec capped = tangent(load(x + i) / softcap) * softcap;
      store(x + i, load(x + i) == kNone ? broadcast(kNone) : capped);
    }
    for (int64_t i = whole; i < count; i++)
      if (x[i] != kNone) x[i] = tangent(broadcast(x[i] / softcap))[0] * softcap;
  }
  // Four at a time: each maximum waits for the one before it.
  Vec tops[4] = {broadcast(sink), broadcast(sink), broadcast(sink), broadcast(sink)};
  int64_t i = 0;
  for (; i + 4 * kWidth <= whole; i += 4 * kWidth)
    for (int64_t k = 0; k < 4; k++) tops[k] = maximum(tops[k], load(x + i + k * kWidth));
  for (; i < whole; i += kWidth) tops[0] = maximum(tops[0], load(x + i));
  top = largest(maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3])));
  for (int64_t i = whole; i < count; i++) top = std::max(top, x[i]);
  if (top == kNone) return 0;
  Vec sums = {};
  for (int64_t i = 0; i < whole; i += kWidth) {
    Vec p = exponential(load(x + i) - top);
    sums += p;
    store(x + i, p);
  }
  float total = sum(sums) + exponential(sink - top);
  for (int64_t i = whole; i < count; i++) total += x[i] = exponential(x[i] - top);
  return total;
}

void rows_of(const ColumnMass& a, int64_t lane, int64_t part) {
  int64_t b = lane / (a.lanes / a.batch);
  float sink = a.sinks ? a.sinks[lane % (a.lanes / a.batch)] : kNone;
  const int64_t* positions = a.positions + b * a.total;
  float* mass = a.mass + (part * a.lanes + lane) * a.total;
  for (int64_t row = a.rows * part / a.parts; row < a.rows * (part + 1) / a.parts; row++) {
    float weight = a.weights[b * a.weight_stride + row];
    if (weight == 0) continue;
    float* x = a.products + (lane * a.rows + row) * a.seen;
    int64_t count = a.mask ? a.seen : a.own[row] + 1;
    if (a.mask) {
      const bool* visible = a.mask + b * a.mask_strides[0] + row * a.mask_strides[1];
      for (int64_t i = 0; i < count; i++)
        if (!visible[i * a.mask_strides[2]]) x[i] = kNone;
    }
    float total = exponentials(x, count, a.softcap, sink);
    if (total == 0) continue;
    add_scaled(x, weight / total, count, mass);
    for (int64_t w = 0; w < a.bands; w++) {
      int64_t first = first_within(positions, count, positions[a.own[row]], a.widths[w * a.batch + b]);
      float* band = a.band + ((w * a.parts + part) * a.lanes + lane) * a.total;
      add_scaled(x + first, weight / total, count - first, band + first);
    }
  }
}

}  // namespace

void column_mass(const ColumnMass* args) {
  args->parallel_for(
      0, args->lanes * args->parts, 1,
      [](int64_t begin, int64_t end, void* context) {
        const auto& a = *static_cast<const ColumnMass*>(context);
        for (int64_t i = begin; i < end; i++) rows_of(a, i / a.parts, i % a.parts);
      },
      const_cast<ColumnMass*>(args));
}

}  // namespace HEADWISE_ISA
