// Products: a few rows and a few queries -> dot products, and weighted sums of rows.
#pragma once
#include <type_traits>

#include "chunk.h"
#include "vectors.h"

namespace HEADWISE_ISA {
namespace {

// Elements in a line of the processor's cache.
template <typename T>
constexpr int64_t kLine = 64 / int64_t(sizeof(T));

// Elements of a row, and the channel that the first of them belongs to.
struct Part {
  int64_t at, channel, count;
};

template <typename T>
inline const T* element(const void* row, int64_t at) {
  return static_cast<const T*>(row) + at;
}

// acc[r][n] += whole vectors of key r times query n. The values of the same rows are fetched meanwhile: the processor
// follows the keys by itself, but not two streams in turn.
//
// 32-bit rows are bound by memory and read one after another, as the processor expects; narrower rows are bound by
// arithmetic and read side by side, so that each load of the query serves all of them.
template <typename T, int R, int N>
inline void multiply(const float* query, int64_t stride, const void* const* keys, const void* const* values, Part part,
                     Vec (&acc)[R][N]) {
  query += part.channel;
  int64_t whole = part.count / kWidth * kWidth;
  if constexpr (sizeof(T) == 4) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const T *key = element<T>(keys[r], part.at), *value = element<T>(values[r], part.at);
      Vec mine[N];
      for (int n = 0; n < N; n++) mine[n] = acc[r][n];
      for (int64_t i = 0; i < whole; i += kWidth) {
        if (i % kLine<T> == 0) __builtin_prefetch(value + i);
        Vec k = load(key + i);
        for (int n = 0; n < N; n++) mine[n] += k * load(query + n * stride + i);
      }
      for (int n = 0; n < N; n++) acc[r][n] = mine[n];
    }
  } else {
    for (int64_t i = 0; i < whole; i += kLine<T>)
      for (int r = 0; r < R; r++) __builtin_prefetch(element<T>(values[r], part.at) + i);
    for (int64_t i = 0; i < whole; i += kWidth) {
      Vec q[N];
      for (int n = 0; n < N; n++) q[n] = load(query + n * stride + i);
      for (int r = 0; r < R; r++) {
        Vec k = load(element<T>(keys[r], part.at) + i);
        for (int n = 0; n < N; n++) acc[r][n] += k * q[n];
      }
    }
  }
}

// What lies behind the last whole vector, added to to[n][r].
template <typename T, int R, int N>
inline void multiply_rest(const float* query, int64_t stride, const void* const* keys, Part part, float* to,
                          int64_t to_stride) {
  for (int64_t i = part.count / kWidth * kWidth; i < part.count; i++)
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++)
        to[n * to_stride + r] += scalar(element<T>(keys[r], part.at)[i]) * query[n * stride + part.channel + i];
}

// Dot products of R keys with N queries that lie `stride` apart, over parts of the rows, each of its own type; to[n][r].
template <int R, int N, typename... T>
inline void dots(const float* query, int64_t stride, const void* const* keys, const void* const* values,
                 const Part (&parts)[sizeof...(T)], float* to, int64_t to_stride) {
  Vec acc[R][N] = {};
  int p = 0;
  (multiply<T>(query, stride, keys, values, parts[p++], acc), ...);
  for (int n = 0; n < N; n++) {
    if constexpr (R == 4)
      sums(acc[0][n], acc[1][n], acc[2][n], acc[3][n], to + n * to_stride);
    else
      for (int r = 0; r < R; r++) to[n * to_stride + r] = sum(acc[r][n]);
  }
  p = 0;
  (multiply_rest<T, R, N>(query, stride, keys, parts[p++], to, to_stride), ...);
}

// The same for all keys of a chunk.
template <int N, typename... T>
inline void dots(const float* query, int64_t stride, const Chunk& chunk, const Part (&parts)[sizeof...(T)], float* to,
                 int64_t to_stride) {
  const void *const *keys = chunk.keys, *const *values = chunk.values;
  int r = 0;
  for (; r + 4 <= chunk.count; r += 4)
    dots<4, N, T...>(query, stride, keys + r, values + r, parts, to + r, to_stride);
  for (; r < chunk.count; r++) dots<1, N, T...>(query, stride, keys + r, values + r, parts, to + r, to_stride);
}

// acc[n] += weights[n][r] times value r, over C vectors of the values and N queries, which stay in registers. The same
// elements of the keys of `next` are fetched meanwhile.
template <int C, int N, typename T>
inline void weigh(const Chunk& chunk, const float* weights, int64_t stride, int64_t at, float* acc, int64_t width,
                  const Chunk* next) {
  Vec sums[N][C];
  for (int n = 0; n < N; n++)
    for (int c = 0; c < C; c++) sums[n][c] = load(acc + n * width + c * kWidth);
  for (int r = 0; r < chunk.count; r++) {
    if (next && r < next->count)
      for (int c = 0; c < C * kWidth; c += kLine<T>) __builtin_prefetch(element<T>(next->keys[r], at) + c);
    for (int c = 0; c < C; c++) {
      Vec v = load(element<T>(chunk.values[r], at) + c * kWidth);
      for (int n = 0; n < N; n++) sums[n][c] += v * weights[n * stride + r];
    }
  }
  for (int n = 0; n < N; n++)
    for (int c = 0; c < C; c++) store(acc + n * width + c * kWidth, sums[n][c]);
}

// The same over a part of the values; `acc` has all channels.
template <int N, typename T>
inline void weigh(const Chunk& chunk, const float* weights, int64_t stride, Part part, float* acc, int64_t width,
                  const Chunk* next = nullptr) {
  acc += part.channel;
  int64_t i = 0;
  for (; i + 4 * kWidth <= part.count; i += 4 * kWidth)
    weigh<4, N, T>(chunk, weights, stride, part.at + i, acc + i, width, next);
  for (; i + kWidth <= part.count; i += kWidth)
    weigh<1, N, T>(chunk, weights, stride, part.at + i, acc + i, width, nullptr);
  for (; i < part.count; i++)
    for (int r = 0; r < chunk.count; r++)
      for (int n = 0; n < N; n++)
        acc[n * width + i] += scalar(element<T>(chunk.values[r], part.at)[i]) * weights[n * stride + r];
}

// Calls `body` with the number of queries at a time: as many as registers hold, with 4 rows.
template <typename Body>
inline void tiled(int64_t rows, Body body) {
  constexpr int kMost = kWidth == 16 ? 4 : 3;  // AVX-512 has twice as many registers
  int64_t n = 0;
  for (; n + kMost <= rows; n += kMost) body(std::integral_constant<int, kMost>(), n);
  if (rows - n == 3) body(std::integral_constant<int, 3>(), n);
  if (rows - n == 2) body(std::integral_constant<int, 2>(), n);
  if (rows - n == 1) body(std::integral_constant<int, 1>(), n);
}

}  // namespace
}  // namespace HEADWISE_ISA
