// Chunk: a few rows of one head, as many as are worked on at a time -> where each of them lies.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace HEADWISE_ISA {
namespace {

// Rows whose logits are in flight: of numbers as many as the first-level cache holds; of codes, which are a quarter of
// the bytes, more, so that sums over a chunk are rarer.
constexpr int kFewRows = 64, kChunk = kWidth == 16 ? 128 : 64;

// Rows that lie side by side in the pages.
struct Run {
  int64_t at, count;
  const char *key, *value;  // of the first of them
};

struct Chunk {
  int count = 0, runs = 0;
  Run run[kChunk];           // those of the pages come first
  const void* keys[kChunk];  // of every row, where they are read one by one
  const void* values[kChunk];

  // The count, rounded up to whole vectors.
  int end() const { return (count + kWidth - 1) / kWidth * kWidth; }
};

// The rows of a chunk by sixteens, each one behind the other in memory.
class Sixteens {
 public:
  // `first` tells where the first row of a run lies, and `bytes` is what a row has. Sixteen rows of several runs are
  // copied together, to `room` for a whole chunk, and behind the last row stands the last one again; without room they
  // are said to lie where the first of them does, which is enough to fetch them.
  template <typename First>
  Sixteens(const Chunk& chunk, First first, int64_t bytes, char* room) : count(chunk.count), bytes(bytes) {
    int run = 0;
    int64_t begin = 0;  // of the run
    auto reach = [&](int row) {
      for (; begin + chunk.run[run].count <= row; run++) begin += chunk.run[run].count;
      return first(chunk.run[run]) + (row - begin) * bytes;
    };
    for (int r = 0; r < count; r += 16) {
      const char*& row = rows[r / 16];
      row = reach(r);
      if (!room || r + 16 <= begin + chunk.run[run].count) continue;
      row = room + r * bytes;
      for (int k = r; k < r + 16; k++) std::memcpy(room + k * bytes, reach(std::min(k, count - 1)), bytes);
    }
  }

  const char* operator[](int r) const { return rows[r / 16]; }

  // Brings sixteen rows on their way to the first-level cache, if there are so many. Always inline: GCC leaves out
  // calls that do nothing else.
  __attribute__((always_inline)) void fetch(int r) const {
    if (r >= count) return;
    for (int64_t i = 0; i < 16 * bytes; i += 64) __builtin_prefetch(rows[r / 16] + i);
  }

  const int count;
  const int64_t bytes;  // of a row

 private:
  const char* rows[kChunk / 16];
};

}  // namespace
}  // namespace HEADWISE_ISA
