// Column mass: a block of query-key products -> its softmax, added up by column, in total and inside each band.
#include <algorithm>

#include "headwise.h"
#include "rows.h"
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

void add_rows(const ColumnMass& a, int64_t lane, int64_t part) {
  int64_t rows = a.block.rows, lanes = a.block.lanes;
  float* mass = a.mass + (part * lanes + lane) * a.total;
  for (int64_t row = rows * part / a.parts; row < rows * (part + 1) / a.parts; row++) {
    if (a.weights[row] == 0) continue;
    Logits logits = logits_of(a.block, lane, row);
    float top = top_of(logits);
    if (top == kNone) continue;
    float weight = a.weights[row] / exponentials<true>(logits, top);
    add_scaled(logits.x, weight, logits.count, mass);
    for (int64_t w = 0; w < a.bands; w++) {
      int64_t first = first_within(a.positions, logits.count, a.positions[a.block.own[row]], a.widths[w]);
      float* band = a.band + ((w * a.parts + part) * lanes + lane) * a.total;
      add_scaled(logits.x + first, weight, logits.count - first, band + first);
    }
  }
}

}  // namespace

void column_mass(const ColumnMass* args) { over_parts(args, add_rows); }

}  // namespace HEADWISE_ISA
