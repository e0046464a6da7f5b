// Partial: logits and rows, a few at a time -> the softmax's state over them, which can be merged with others.
#pragma once
#include <algorithm>

#include "vectors.h"

namespace HEADWISE_ISA {
namespace {

inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Per query row: the largest logit, the sum of exponentials, and sums of what these weigh (the online softmax of
// Milakov and Gimelshein, 2018).
struct Partial {
  int64_t rows, width;
  float* top;
  float* sum;
  float* acc;  // [rows, width]

  static int64_t floats(int64_t rows, int64_t width) { return 2 * padded(rows) + rows * width; }

  Partial(float* memory, int64_t rows, int64_t width)
      : rows(rows), width(width), top(memory), sum(memory + padded(rows)), acc(memory + 2 * padded(rows)) {}

  void clear() {
    std::fill_n(top, rows, kNone);
    std::fill_n(sum, rows, 0.0f);
    std::fill_n(acc, rows * width, 0.0f);
  }

  // `count` logits of query row n, whole vectors of them, become weights relative to its largest logit so far.
  void absorb(int64_t n, float* logits, int count) {
    Vec best = load(logits);
    for (int r = kWidth; r < count; r += kWidth) best = maximum(best, load(logits + r));
    float highest = std::max(top[n], largest(best));
    if (highest == kNone) {
      if (!any_nan(logits, count)) {
        std::fill_n(logits, count, 0.0f);
        return;
      }
      // Comparisons have passed over what is no number: it is not hidden, and makes an output that is none.
      highest = 0;
    }
    raise(n, highest);
    Vec added = {};
    for (int r = 0; r < count; r += kWidth) {
      Vec p = exponential(load(logits + r) - highest);
      added += p;
      store(logits + r, p);
    }
    sum[n] += HEADWISE_ISA::sum(added);
  }

  // Takes a logit that weighs nothing into the denominator.
  void absorb_sink(int64_t n, float sink) {
    raise(n, sink);
    sum[n] += exponential(sink - top[n]);
  }

  // `from` may have more behind each row's sums, which is left out.
  void merge(const Partial& from) {
    for (int64_t n = 0; n < rows; n++) {
      if (from.top[n] == kNone) continue;
      raise(n, from.top[n]);
      float factor = exponential(from.top[n] - top[n]);
      sum[n] += factor * from.sum[n];
      float* mine = acc + n * width;
      const float* its = from.acc + n * from.width;
      for (int64_t i = 0; i < width; i += kWidth) store(mine + i, load(mine + i) + load(its + i) * factor);
    }
  }

 private:
  void raise(int64_t n, float highest) {
    if (highest <= top[n]) return;
    float factor = exponential(top[n] - highest);
    for (int64_t i = 0; i < width; i += kWidth) store(acc + n * width + i, load(acc + n * width + i) * factor);
    sum[n] *= factor;
    top[n] = highest;
  }
};

}  // namespace
}  // namespace HEADWISE_ISA
