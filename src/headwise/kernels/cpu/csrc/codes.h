// Codes: rows as codes in pages -> their logits, and weighted sums of what they stand for.
//
// A number of a row is step * code + least, with the step and the least number of its group of channels, and then
// rotated back. None is ever written down: the query is rotated once per head instead of every key, the sum of the
// values is rotated back once per head, and steps and least numbers join in once per row and group.
#pragma once
#include <algorithm>

#include "headwise.h"
#include "partial.h"
#include "products.h"

namespace HEADWISE_ISA {
namespace {

// The keys, or the values, of one view.
struct CodeReader {
  const headwise::Coding& coding;
  int64_t dim, groups;
  float* steps;  // [groups, kChunk]
  float* least;  // [groups, kChunk]
  float* side;   // [kChunk, 2 * groups]: the same, row by row

  static int64_t floats(const headwise::Coding& coding) { return 4 * coding.groups * kChunk; }

  CodeReader(const headwise::Coding& coding, int64_t dim, float* memory)
      : coding(coding), dim(dim), groups(coding.groups), steps(memory), least(steps + groups * kChunk),
        side(least + groups * kChunk) {}

  // Steps and least numbers of a chunk; 0 where its last vector is not full.
  void read(const Chunk& chunk) {
    int64_t pair = 2 * groups, r = 0;
    for (int i = 0; i < chunk.runs; i++) {
      const auto* from = reinterpret_cast<const Float16*>(coding.steps) + chunk.run[i].at * pair;
      int64_t count = chunk.run[i].count * pair, whole = count / kWidth * kWidth;
      for (int64_t j = 0; j < whole; j += kWidth) store(side + r * pair + j, load(from + j));
      for (int64_t j = whole; j < count; j++) side[r * pair + j] = scalar(from[j]);
      r += chunk.run[i].count;
    }
    std::fill(side + r * pair, side + chunk.end() * pair, 0.0f);
    if (groups == 1) {
      for (r = 0; r < chunk.end(); r += kWidth) apart(side + 2 * r, steps + r, least + r);
    } else {
      for (r = 0; r < chunk.end(); r++)
        for (int64_t i = 0; i < pair; i++) steps[i * kChunk + r] = side[r * pair + i];
    }
  }

  // Where the codes of a group lie in a row: all of them with 8 bits, the two halves' with 4.
  Part whole(int64_t group) const { return {first(group), first(group), dim / groups}; }

  Part low(int64_t group) const {
    return {first(group), first(group), std::max<int64_t>(0, std::min(first(group + 1), dim / 2) - first(group))};
  }

  Part high(int64_t group) const {
    int64_t start = std::max(first(group), dim / 2);
    return {start - dim / 2, start, std::max<int64_t>(0, first(group + 1) - start)};
  }

  int64_t first(int64_t group) const { return group * (dim / groups); }
};

// The rows of a matrix, some at a time, as keys and as values.
template <typename Body>
inline void over_rows(const float* matrix, int64_t dim, Body body) {
  Chunk chunk;
  for (int64_t first = 0; first < dim; first += chunk.count) {
    chunk.count = int(std::min<int64_t>(kChunk, dim - first));
    for (int r = 0; r < chunk.count; r++) chunk.keys[r] = chunk.values[r] = matrix + (first + r) * dim;
    body(chunk, first);
  }
}

// The rows of one head in one view, as they meet its `rows` queries.
class Codes {
 public:
  Partial partial;  // of codes; behind the sums of each row stand, group by group, those of the least numbers

  static int64_t floats(const headwise::Pages& pages, int64_t rows, int64_t key_dim, int64_t value_dim) {
    const auto &keys = pages.key_coding, &values = pages.value_coding;
    return padded(Partial::floats(rows, width(values, value_dim)) + CodeReader::floats(keys) + CodeReader::floats(values) +
                  rows * (key_dim + keys.groups + value_dim));
  }

  Codes(const headwise::Pages& pages, int64_t rows, int64_t key_dim, int64_t value_dim, float* memory)
      : partial(memory, rows, width(pages.value_coding, value_dim)), rows(rows),
        keys(pages.key_coding, key_dim, memory + Partial::floats(rows, partial.width)),
        values(pages.value_coding, value_dim, keys.steps + CodeReader::floats(keys.coding)),
        query(values.steps + CodeReader::floats(values.coding)), sums(query + rows * key_dim),
        rotated(sums + rows * keys.groups) {}

  // Takes the queries of a head, [rows, key_dim], and nothing seen yet.
  void begin(const float* asked) {
    partial.clear();
    std::fill_n(query, rows * keys.dim, 0.0f);
    over_rows(keys.coding.hadamard, keys.dim, [&](const Chunk& chunk, int64_t first) {
      tiled(rows, [&](auto tile, int64_t n) {
        weigh<tile(), float>(chunk, asked + n * keys.dim + first, keys.dim, {0, 0, keys.dim}, query + n * keys.dim,
                             keys.dim);
      });
    });
    for (int64_t i = 0; i < rows * keys.groups; i++) {
      const float* channels = query + i * (keys.dim / keys.groups);
      sums[i] = 0;
      for (int64_t c = 0; c < keys.dim / keys.groups; c++) sums[i] += channels[c];
    }
  }

  // Logits of a chunk, to[n][r].
  void logits(const Chunk& chunk, float* to) {
    keys.read(chunk);
    tiled(rows, [&](auto tile, int64_t n) {
      float products[tile() * kChunk];
      for (int64_t group = 0; group < keys.groups; group++) {
        const float* asked = query + n * keys.dim;
        if (keys.coding.bits == 8)
          dots<tile(), Byte>(asked, keys.dim, chunk, {keys.whole(group)}, products, kChunk);
        else
          dots<tile(), LowHalf, HighHalf>(asked, keys.dim, chunk, {keys.low(group), keys.high(group)}, products,
                                          kChunk);
        const float *steps = keys.steps + group * kChunk, *least = keys.least + group * kChunk;
        for (int k = 0; k < tile(); k++)
          for (int r = 0; r < chunk.end(); r += kWidth) {
            float* x = to + (n + k) * kChunk + r;
            Vec before = group ? load(x) : Vec{};
            store(x, before + load(products + k * kChunk + r) * load(steps + r) +
                         load(least + r) * sums[(n + k) * keys.groups + group]);
          }
      }
    });
  }

  // Adds up the values of a chunk, by weights[n][r].
  void weigh_values(const Chunk& chunk, const float* weights) {
    values.read(chunk);
    tiled(rows, [&](auto tile, int64_t n) {
      float scaled[tile() * kChunk], *acc = partial.acc + n * partial.width;
      for (int64_t group = 0; group < values.groups; group++) {
        const float *steps = values.steps + group * kChunk, *least = values.least + group * kChunk;
        for (int k = 0; k < tile(); k++) {
          Vec more = {};
          for (int r = 0; r < chunk.end(); r += kWidth) {
            Vec weight = load(weights + (n + k) * kChunk + r);
            store(scaled + k * kChunk + r, weight * load(steps + r));
            more += weight * load(least + r);
          }
          acc[k * partial.width + padded(values.dim) + group] += sum(more);
        }
        if (values.coding.bits == 8) {
          weigh<tile(), Byte>(chunk, scaled, kChunk, values.whole(group), acc, partial.width);
        } else {
          weigh<tile(), LowHalf>(chunk, scaled, kChunk, values.low(group), acc, partial.width);
          weigh<tile(), HighHalf>(chunk, scaled, kChunk, values.high(group), acc, partial.width);
        }
      }
    });
  }

  // What was seen since `begin`, as numbers.
  const Partial& end() {
    int64_t dim = values.dim, size = dim / values.groups;
    for (int64_t n = 0; n < rows; n++) {
      float* acc = partial.acc + n * partial.width;
      for (int64_t i = 0; i < dim; i++) rotated[n * dim + i] = acc[i] + acc[padded(dim) + i / size];
    }
    over_rows(values.coding.hadamard, dim, [&](const Chunk& chunk, int64_t first) {
      tiled(rows, [&](auto tile, int64_t n) {
        dots<tile(), float>(rotated + n * dim, dim, chunk, {{0, 0, dim}}, partial.acc + n * partial.width + first,
                            partial.width);
      });
    });
    return partial;
  }

 private:
  static int64_t width(const headwise::Coding& values, int64_t dim) { return padded(dim) + padded(values.groups); }

  const int64_t rows;
  CodeReader keys, values;
  float* query;    // [rows, key_dim], rotated
  float* sums;     // [rows, groups]: of the channels of each group of `query`
  float* rotated;  // [rows, value_dim]: sums of values, before they are rotated back
};

}  // namespace
}  // namespace HEADWISE_ISA
