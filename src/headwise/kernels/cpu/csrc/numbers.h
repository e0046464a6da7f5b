// Numbers: rows as the model made them -> their logits, and weighted sums of their values.
#pragma once
#include "partial.h"
#include "products.h"

namespace HEADWISE_ISA {
namespace {

// The exact rows of one head, as they meet its `rows` queries; the same calls as `Codes` has.
template <typename T>
struct Numbers {
  static constexpr int kAtATime = kFewRows;

  int64_t rows, key_dim, value_dim;
  const float* query;  // [rows, key_dim]
  Partial& partial;

  bool one_by_one() const { return true; }

  void logits(const Chunk& chunk, float* to) {
    tiled(rows, [&](auto tile, int64_t n) {
      dots<tile(), T>(query + n * key_dim, key_dim, chunk, {{0, 0, key_dim}}, to + n * kChunk, kChunk);
    });
  }

  // The keys of the next chunk are fetched meanwhile, but for 32-bit rows, which the processor follows by itself.
  void weigh_values(const Chunk& chunk, const Chunk& next, const float* weights) {
    tiled(rows, [&](auto tile, int64_t n) {
      weigh<tile(), T>(chunk, weights + n * kChunk, kChunk, {0, 0, value_dim}, partial.acc + n * partial.width,
                       partial.width, sizeof(T) < 4 && n == 0 ? &next : nullptr);
    });
  }
};

}  // namespace
}  // namespace HEADWISE_ISA
