// Pages: rows of one head in pages -> a chunk of them, as addresses, to be read where they lie; and their biases.
#pragma once

#include <algorithm>
#include <cstring>

#include "headwise.h"
#include "partial.h"
#include "products.h"

namespace HEADWISE_ISA {
namespace {

using headwise::Pages;
using headwise::size_of;

// Where the rows of a chunk stand.
struct Places {
  int64_t first;            // index among the head's rows
  int64_t columns[kChunk];  // only where there is a mask, or are marks
  int64_t columns_in_mask;  // or more than there can be, where there is none
  bool outside = false;     // whether a column was not in it, and the first was taken instead
};

struct Taken {
  Chunk chunk;
  Places places;
};

// Rows i..end of a head, to be read where they lie; where each of them does, if it is read by itself, and their columns
// too, where those are looked at.
inline void take(int64_t head, const Pages& p, int64_t i, int64_t end, bool one_by_one, bool with_columns,
                 Taken& taken) {
  auto& [chunk, places] = taken;
  int64_t element = size_of(p.type), key_bytes = p.key_strides[1] * element, value_bytes = p.value_strides[1] * element;
  const int32_t* entry = p.table + head * p.table_width + i / p.page_size;
  // Only the first page is not entered at its first row.
  for (int64_t offset = i % p.page_size; i < end; offset = 0, entry++) {
    int64_t count = std::min(end - i, p.page_size - offset), page = *entry, at = page * p.page_size + offset;
    const char* key = static_cast<const char*>(p.keys) + page * p.key_strides[0] * element + offset * key_bytes;
    const char* value = static_cast<const char*>(p.values) + page * p.value_strides[0] * element + offset * value_bytes;
    int first = chunk.count;
    chunk.run[chunk.runs++] = {at, count, key, value};
    chunk.count += int(count);
    i += count;
    for (int r = first; one_by_one && r < chunk.count; r++, key += key_bytes, value += value_bytes) {
      chunk.keys[r] = key;
      chunk.values[r] = value;
    }
    for (int r = first; with_columns && r < chunk.count; r++, at++) {
      int64_t column = p.columns[at];
      bool outside = column < 0 || column >= places.columns_in_mask;
      places.columns[r] = outside ? 0 : column;
      places.outside |= outside;
    }
  }
}

// Fresh rows i..end of a head, whose columns are the last of the mask.
template <typename T>
inline void take_fresh(const headwise::Fresh& f, int64_t b, int64_t h, int64_t i, int64_t end, Taken& taken) {
  auto& [chunk, places] = taken;
  for (; i < end; i++) {
    int r = chunk.count++;
    chunk.keys[r] = (const T*)f.keys + b * f.key_strides[0] + h * f.key_strides[1] + i * f.key_strides[2];
    chunk.values[r] = (const T*)f.values + b * f.value_strides[0] + h * f.value_strides[1] + i * f.value_strides[2];
    places.columns[r] = places.columns_in_mask - f.count + i;
  }
}

// Room for a chunk's rows where their channels do not lie side by side; 0 where they do.
inline int64_t gathered_bytes(const Pages& p) {
  int64_t apart = (p.key_strides[2] != 1 ? p.key_width : 0) + (p.value_strides[2] != 1 ? p.value_width : 0);
  return padded(kChunk * apart * size_of(p.type));
}

inline char* gather(const void** rows, int count, int64_t stride, int64_t width, int64_t element, char* to) {
  if (stride == 1) return to;
  for (int r = 0; r < count; r++) {
    const char* from = static_cast<const char*>(rows[r]);
    rows[r] = to;
    for (int64_t i = 0; i < width; i++, to += element) std::memcpy(to, from + i * stride * element, element);
  }
  return to;
}

// Copies such rows to `to`, so that everything behind sees rows whose channels do lie side by side, as those of fresh
// rows do, which come last.
inline void gather(const Pages& p, Chunk& chunk, char* to) {
  int count = 0;
  for (int i = 0; i < chunk.runs; i++) count += int(chunk.run[i].count);
  to = gather(chunk.keys, count, p.key_strides[2], p.key_width, size_of(p.type), to);
  gather(chunk.values, count, p.value_strides[2], p.value_width, size_of(p.type), to);
}

// Adds the biases of a chunk's rows to their logits, logits[n][r]; the fresh rows, which come last, have none.
inline void add_biases(const Pages& p, const Chunk& chunk, int64_t rows, float* logits) {
  if (!p.biases) return;
  float biases[kChunk];
  int64_t r = 0;
  for (int i = 0; i < chunk.runs; i++) {
    // Only the rows of the head itself: what lies behind them in the page may be anything.
    const auto* from = reinterpret_cast<const Float16*>(p.biases) + chunk.run[i].at;
    int64_t count = chunk.run[i].count, whole = count / kWidth * kWidth;
    for (int64_t j = 0; j < whole; j += kWidth) store(biases + r + j, load(from + j));
    for (int64_t j = whole; j < count; j++) biases[r + j] = scalar(from[j]);
    r += count;
  }
  std::fill(biases + r, biases + chunk.end(), 0.0f);
  for (int64_t n = 0; n < rows; n++)
    for (r = 0; r < chunk.end(); r += kWidth) {
      float* x = logits + n * kChunk + r;
      store(x, load(x) + load(biases + r));
    }
}

}  // namespace
}  // namespace HEADWISE_ISA
