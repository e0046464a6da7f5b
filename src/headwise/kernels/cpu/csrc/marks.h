// Marks: what the columns of a chunk's rows have beside, and the gate of every query -> added to their logits.
#pragma once
#include <algorithm>

#include "headwise.h"
#include "pages.h"

namespace HEADWISE_ISA {
namespace {

// To the logits of the chunk, logits[n][r], whose rows are fresh ones from `fresh` on. A query without a gate keeps its
// logits as they are, to the last bit.
inline void add_marks(const headwise::Decode& a, int64_t head, int64_t fresh, const Chunk& chunk, const Places& places,
                      float* logits) {
  const auto& m = a.marks;
  int64_t b = head / a.heads, h = head % a.heads;
  float marks[kChunk];
  bool any = false;
  for (int r = 0; r < chunk.count; r++) {
    if (r >= fresh)
      marks[r] = m.fresh ? m.fresh[b * a.fresh.count + r - fresh] : 0;
    else
      marks[r] = places.columns[r] < m.count ? m.columns[b * m.count + places.columns[r]] : 0;
    any |= marks[r] != 0;
  }
  if (!any) return;
  std::fill(marks + chunk.count, marks + chunk.end(), 0.0f);
  const int64_t* s = m.gate_strides;
  for (int64_t n = 0; n < a.group * a.queries; n++) {
    float gate = m.gates[b * s[0] + h * s[1] + n / a.queries * s[2] + n % a.queries * s[3]];
    if (gate == 0) continue;
    for (int r = 0; r < chunk.end(); r += kWidth) {
      float* x = logits + n * kChunk + r;
      store(x, load(x) + load(marks + r) * gate);
    }
  }
}

}  // namespace
}  // namespace HEADWISE_ISA
