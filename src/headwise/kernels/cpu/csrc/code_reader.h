// Code reader: the keys, or the values, of a view of codes -> where the codes of a chunk lie, and how they are read.
#pragma once
#include <algorithm>

#include "chunk.h"
#include "headwise.h"
#include "integers.h"

namespace HEADWISE_ISA {
namespace {

struct CodeReader {
  const headwise::Coding& coding;
  int64_t dim, groups, size;  // channels, and those of a group
  int64_t bytes, step_bytes;  // of a row
  bool integers;              // whether products are those of integers
  float* steps;               // [groups, kChunk]
  float* least;               // [groups, kChunk]
  float* side;                // [kWidth, 2 * groups]: the same, row by row
  char* room;                 // for the steps of a chunk

  static int64_t floats(const headwise::Coding& coding) { return coding.groups * (3 * kChunk + 2 * kWidth); }

  CodeReader(const headwise::Coding& coding, int64_t dim, float* memory)
      : coding(coding), dim(dim), groups(coding.groups), size(dim / groups), bytes(coding.bits == 8 ? dim : dim / 2),
        step_bytes(2 * groups * int64_t(sizeof(Float16))), integers(kIntegers && size % 16 == 0 && bytes % 16 == 0),
        steps(memory), least(steps + groups * kChunk), side(least + groups * kChunk),
        room(reinterpret_cast<char*>(side + 2 * groups * kWidth)) {}

  // Where those of a run's first row lie.
  auto first_steps() const {
    return [this](const Run& run) { return reinterpret_cast<const char*>(coding.steps) + run.at * step_bytes; };
  }

  // Steps and least numbers of a chunk, and up to whole vectors.
  void read(const Chunk& chunk) {
    Sixteens rows(chunk, first_steps(), step_bytes, room);
    for (int r = 0; r < chunk.end(); r += kWidth) {
      const auto* from = reinterpret_cast<const Float16*>(rows[r]) + r % 16 * 2 * groups;
      if (groups == 1) {
        apart(load(from), load(from + kWidth), steps + r, least + r);
        continue;
      }
      for (int64_t j = 0; j < 2 * groups * kWidth; j += kWidth) store(side + j, load(from + j));
      for (int64_t i = 0; i < 2 * groups; i++)
        for (int64_t k = 0; k < kWidth; k++) steps[i * kChunk + r + k] = side[k * 2 * groups + i];
    }
  }

  // Brings the steps of a chunk on their way; always inline for the same reason.
  __attribute__((always_inline)) void fetch_steps(const Chunk& chunk) const {
    Sixteens rows(chunk, first_steps(), step_bytes, nullptr);
    for (int r = 0; r < chunk.count; r += 16) rows.fetch(r);
  }

  // The code in the middle.
  float middle() const { return coding.bits == 8 ? 127.5f : 7.5f; }

  // Where the codes of a group lie in a row: all of them with 8 bits, the two halves' with 4.
  Part whole(int64_t group) const { return {first(group), first(group), size}; }

  Part low(int64_t group) const {
    return {first(group), first(group), std::max<int64_t>(0, std::min(first(group + 1), dim / 2) - first(group))};
  }

  Part high(int64_t group) const {
    int64_t start = std::max(first(group), dim / 2);
    return {start - dim / 2, start, std::max<int64_t>(0, first(group + 1) - start)};
  }

 private:
  int64_t first(int64_t group) const { return group * size; }
};

}  // namespace
}  // namespace HEADWISE_ISA
