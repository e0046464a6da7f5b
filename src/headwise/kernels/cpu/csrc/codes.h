// Codes: rows as codes in pages -> their logits, and weighted sums of what they stand for.
//
// A number of a row is step * code + least, with the step and the least number of its group of channels, and then
// rotated back. None is ever written down: the query is rotated once per head instead of every key, the sum of the
// values is rotated back once per head, and steps and least numbers join in once per row and group.
#pragma once
#include <algorithm>

#include "code_reader.h"
#include "headwise.h"
#include "integers.h"
#include "partial.h"
#include "products.h"

namespace HEADWISE_ISA {
namespace {

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
  static constexpr int kAtATime = kChunk;

  Partial partial;  // of codes; behind the sums of each row stand, group by group, those of the least numbers

  static int64_t floats(const headwise::Pages& pages, int64_t rows, int64_t key_dim, int64_t value_dim) {
    const auto &keys = pages.key_coding, &values = pages.value_coding;
    int64_t sides = CodeReader::floats(keys) + CodeReader::floats(values);
    int64_t room = kChunk * std::max(key_dim, value_dim) / 4;
    return padded(Partial::floats(rows, width(values, value_dim)) + sides + rows * (key_dim + keys.groups + value_dim) +
                  IntegerQuery::floats(rows, key_dim, keys.groups) + room);
  }

  Codes(const headwise::Pages& pages, int64_t rows, int64_t key_dim, int64_t value_dim, float* memory)
      : partial(memory, rows, width(pages.value_coding, value_dim)), rows(rows),
        keys(pages.key_coding, key_dim, memory + Partial::floats(rows, partial.width)),
        values(pages.value_coding, value_dim, keys.steps + CodeReader::floats(keys.coding)),
        query(values.steps + CodeReader::floats(values.coding)), sums(query + rows * key_dim),
        rotated(sums + rows * keys.groups), integers(rows, key_dim, keys.groups, rotated + rows * value_dim),
        room(reinterpret_cast<char*>(rotated + rows * value_dim + IntegerQuery::floats(rows, key_dim, keys.groups))) {}

  // Floating-point products are made row by row.
  bool one_by_one() const { return !keys.integers || !values.integers; }

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
      const float* channels = query + i * keys.size;
      sums[i] = 0;
      for (int64_t c = 0; c < keys.size; c++) sums[i] += channels[c];
    }
    if (keys.integers) integers.take(query, sums, keys.middle());
  }

  // Logits of a chunk, to[n][r]. Its values are fetched meanwhile.
  void logits(const Chunk& chunk, float* to) {
    keys.read(chunk);
    values.fetch_steps(chunk);
    Sixteens fetched(chunk, [](const Run& run) { return run.value; }, values.bytes, nullptr);
    Sixteens bytes(chunk, [](const Run& run) { return run.key; }, keys.bytes, keys.integers ? room : nullptr);
    tiled(rows, [&](auto tile, int64_t n) {
      float products[tile() * kChunk];
      for (int64_t group = 0; group < keys.groups; group++) {
        multiply<tile()>(chunk, bytes, n, group, n + group ? nullptr : &fetched, products);
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

  // Adds up the values of a chunk, by weights[n][r]. The keys of the next are fetched meanwhile.
  void weigh_values(const Chunk& chunk, const Chunk& next, const float* weights) {
    values.read(chunk);
    keys.fetch_steps(next);
    Sixteens fetched(next, [](const Run& run) { return run.key; }, keys.bytes, nullptr);
    Sixteens bytes(chunk, [](const Run& run) { return run.value; }, values.bytes, values.integers ? room : nullptr);
    tiled(rows, [&](auto tile, int64_t n) {
      Weights<tile()> by_step;
      float* acc = partial.acc + n * partial.width;
      for (int64_t group = 0; group < values.groups; group++) {
        const float *steps = values.steps + group * kChunk, *least = values.least + group * kChunk;
        for (int k = 0; k < tile(); k++) {
          Vec most = {}, all = {}, more = {};
          for (int r = 0; r < chunk.end(); r += kWidth) {
            Vec weight = load(weights + (n + k) * kChunk + r), x = weight * load(steps + r);
            store(by_step.all[k] + r, x);
            most = maximum(most, x);
            all += x;
            more += weight * load(least + r);
          }
          by_step.largest[k] = largest(most);
          by_step.sums[k] = sum(all);
          acc[k * partial.width + padded(values.dim) + group] += sum(more);
        }
        add_up<tile()>(chunk, bytes, by_step, group, n + group ? nullptr : &next, fetched, acc);
      }
    });
  }

  // What was seen since `begin`, as numbers.
  const Partial& end() {
    int64_t dim = values.dim, size = values.size;
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
  // Products of the codes of a group of channels with N queries from the n-th on, to[k][r].
  template <int N>
  void multiply(const Chunk& chunk, const Sixteens& bytes, int64_t n, int64_t group, const Sixteens* fetched,
                float* to) {
    Part whole = keys.whole(group), low = keys.low(group), high = keys.high(group);
#if defined(HEADWISE_INTEGERS)
    if (keys.integers) {
      if (keys.coding.bits == 8) return dots<N, Byte>(integers, n, group, bytes, {whole}, fetched, to);
      if (keys.groups == 1) return dots<N, BothHalves>(integers, n, group, bytes, {low}, fetched, to);
      return dots<N, LowHalf, HighHalf>(integers, n, group, bytes, {low, high}, fetched, to);
    }
#endif
    const float* asked = query + n * keys.dim;
    if (keys.coding.bits == 8) return dots<N, Byte>(asked, keys.dim, chunk, {whole}, to, kChunk);
    dots<N, LowHalf, HighHalf>(asked, keys.dim, chunk, {low, high}, to, kChunk);
  }

  // Adds the codes of a group of channels, weighed, to N rows of sums.
  template <int N>
  void add_up(const Chunk& chunk, const Sixteens& bytes, const Weights<N>& weights, int64_t group, const Chunk* next,
              const Sixteens& next_bytes, float* acc) {
    Part whole = values.whole(group), low = values.low(group), high = values.high(group);
#if defined(HEADWISE_INTEGERS)
    if (values.integers) {
      IntegerWeights<N> by(weights, chunk.end(), values.middle());
      for (int k = 0; k < N; k++) acc[k * partial.width + padded(values.dim) + group] += by.missing[k];
      const Sixteens* fetched = next ? &next_bytes : nullptr;
      if (values.coding.bits == 8) return weigh<Byte>(bytes, by, whole, fetched, acc, partial.width);
      if (values.groups == 1) return weigh<BothHalves>(bytes, by, low, fetched, acc, partial.width);
      weigh<LowHalf>(bytes, by, low, fetched, acc, partial.width);
      return weigh<HighHalf>(bytes, by, high, nullptr, acc, partial.width);
    }
#endif
    const float* by = weights.all[0];
    if (values.coding.bits == 8) return weigh<N, Byte>(chunk, by, kChunk, whole, acc, partial.width, next);
    weigh<N, LowHalf>(chunk, by, kChunk, low, acc, partial.width, next);
    weigh<N, HighHalf>(chunk, by, kChunk, high, acc, partial.width);
  }

  static int64_t width(const headwise::Coding& values, int64_t dim) { return padded(dim) + padded(values.groups); }

  const int64_t rows;
  CodeReader keys, values;
  float* query;    // [rows, key_dim], rotated
  float* sums;     // [rows, groups]: of the channels of each group of `query`
  float* rotated;  // [rows, value_dim]: sums of values, before they are rotated back
  IntegerQuery integers;
  char* room;  // for the codes of a chunk
};

}  // namespace
}  // namespace HEADWISE_ISA
