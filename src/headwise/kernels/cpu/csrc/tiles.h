// Tiles: packed rows of keys or values -> products with a few rows at a time, in registers.
#pragma once
#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace HEADWISE_ISA {
namespace {

// A tile is kTileRows rows of the left matrix times kTileColumns columns of the right one: 12 registers of sums, two of
// the right matrix and one of the left, of the 16 that AVX2 and SSE have.
constexpr int64_t kTileRows = 6;
constexpr int64_t kTileColumns = 2 * kWidth;

inline int64_t tiled(int64_t n) { return (n + kTileColumns - 1) / kTileColumns * kTileColumns; }

// c[m][n] = (more ? c[m][n] : 0) + sum over k of a[m][k] * b[k][n], for kTileColumns columns n.
template <int kRows>
inline void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count, bool more,
                     float* c, int64_t c_stride) {
  Vec sums[kRows][2];
  for (int m = 0; m < kRows; m++)
    for (int v = 0; v < 2; v++) sums[m][v] = more ? load(c + m * c_stride + v * kWidth) : Vec{};
  for (int64_t k = 0; k < count; k++) {
    Vec first = load(b + k * b_stride), second = load(b + k * b_stride + kWidth);
    for (int m = 0; m < kRows; m++) {
      Vec x = broadcast(a[m * a_stride + k]);
      sums[m][0] += x * first;
      sums[m][1] += x * second;
    }
  }
  for (int m = 0; m < kRows; m++)
    for (int v = 0; v < 2; v++) store(c + m * c_stride + v * kWidth, sums[m][v]);
}

// The same for any number of rows.
inline void multiply(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count,
                     bool more, float* c, int64_t c_stride) {
  while (rows > 0) {
    switch (std::min(rows, kTileRows)) {
      case 6: multiply<6>(a, a_stride, b, b_stride, count, more, c, c_stride); break;
      case 5: multiply<5>(a, a_stride, b, b_stride, count, more, c, c_stride); break;
      case 4: multiply<4>(a, a_stride, b, b_stride, count, more, c, c_stride); break;
      case 3: multiply<3>(a, a_stride, b, b_stride, count, more, c, c_stride); break;
      case 2: multiply<2>(a, a_stride, b, b_stride, count, more, c, c_stride); break;
      default: multiply<1>(a, a_stride, b, b_stride, count, more, c, c_stride);
    }
    rows -= kTileRows, a += kTileRows * a_stride, c += kTileRows * c_stride;
  }
}

// Numbers of any type, each times the scale, in order.
template <typename T>
inline void widen(const T* from, float scale, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i) * scale);
  for (; i < count; i++) to[i] = scalar(from[i]) * scale;
}

// Rows of numbers, `stride` elements apart; those from `end` on are 0.
template <typename T>
struct Source {
  const T* rows;
  int64_t stride, end, dim;
};

// kTileColumns rows from `first` on, turned over: to[i][row].
template <typename T>
inline void pack_across(const Source<T>& from, int64_t first, float* to) {
  int64_t there = std::min(kTileColumns, from.end - first);
  if (there < kTileColumns) std::fill_n(to, from.dim * kTileColumns, 0.0f);
  for (int64_t row = 0; row < there; row++) {
    const T* x = from.rows + (first + row) * from.stride;
    int64_t i = 0;
    for (; i + kWidth <= from.dim; i += kWidth) {
      Vec some = load(x + i);
      for (int j = 0; j < kWidth; j++) to[(i + j) * kTileColumns + row] = some[j];
    }
    for (; i < from.dim; i++) to[i * kTileColumns + row] = scalar(x[i]);
  }
}

// The same rows as they are: to[row][i], each of `width` numbers, which are 0 from `dim` on.
template <typename T>
inline void pack(const Source<T>& from, int64_t first, int64_t width, float* to) {
  for (int64_t row = first; row < first + kTileColumns; row++, to += width) {
    int64_t dim = row < from.end ? from.dim : 0;
    if (dim) widen(from.rows + row * from.stride, 1, dim, to);
    std::fill(to + dim, to + width, 0.0f);
  }
}

}  // namespace
}  // namespace HEADWISE_ISA
