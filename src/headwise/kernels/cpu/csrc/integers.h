// Integers: codes in pages -> their products with queries, and their sums by weights, as dot products of bytes.
//
// A number of the other side is an integer of 16 bits times a scale, cut into two halves of 8 bits, so that one
// instruction (VNNI's vpdpbusd) multiplies 64 codes and adds them up by fours. Rows are taken by fours, sixteen bytes
// of each, one in every quarter of a vector. Codes are never negative, so what rounding takes from the numbers of the
// other side would not cancel: what it takes from their sum is added again, times the code in the middle.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>

#include "chunk.h"
#include "partial.h"
#include "products.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define HEADWISE_INTEGERS 1
#endif

namespace HEADWISE_ISA {
namespace {

// What N queries give the rows of a chunk, by the steps of these.
template <int N>
struct Weights {
  float all[N][kChunk];
  float largest[N], sums[N];
};

#if defined(HEADWISE_INTEGERS)

constexpr bool kIntegers = true;

// Both codes of a byte: of a channel, and of that which is half a row further.
struct BothHalves {};

// Codes in a byte, and so vectors that a vector of bytes becomes.
template <typename T>
constexpr int kCodes = std::is_same_v<T, BothHalves> ? 2 : 1;

// The largest integer whose upper half, rounded, is one of 8 bits.
constexpr float kLargest = 127 * 256 + 127;

// Numbers over a scale, whole vectors of them, as integers: of each vector the upper halves, then the lower ones, and
// `step` bytes further those of the next. Returns how much less they are together than the numbers, whose sum is given.
inline float to_integers(const float* from, int64_t count, float scale, float total, int8_t* to, int64_t step) {
  __m512 factor = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
  __m512i all = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += kWidth, to += step) {
    __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)load(from + i), factor));
    __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(upper));
    _mm_storeu_si128((__m128i*)(to + 16), _mm512_cvtepi32_epi8(x));
    all = _mm512_add_epi32(all, x);
  }
  return total - scale * float(_mm512_reduce_add_epi32(all));
}

// Sums of products with upper and with lower halves, as one.
inline __m512i whole(const __m512i (&halves)[2]) {
  return _mm512_add_epi32(_mm512_slli_epi32(halves[0], 8), halves[1]);
}

// sums += codes times others, by fours. Not by the compiler's function: around that GCC copies every sum in every turn.
inline void add_products(__m512i& sums, __m512i codes, __m512i others) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(others));
}

// Sixteen bytes of each of four rows.
inline __m512i quarters(const char* row, int64_t step) {
  auto bytes = [&](int r) { return _mm_loadu_si128((const __m128i*)(row + r * step)); };
  __m512i all = _mm512_castsi128_si512(bytes(0));
  all = _mm512_inserti32x4(all, bytes(1), 1);
  all = _mm512_inserti32x4(all, bytes(2), 2);
  return _mm512_inserti32x4(all, bytes(3), 3);
}

// The codes of bytes, one of each.
template <typename T>
inline __m512i codes(__m512i bytes, int code) {
  if (std::is_same_v<T, Byte>) return bytes;
  bool low = std::is_same_v<T, LowHalf> || (std::is_same_v<T, BothHalves> && code == 0);
  return _mm512_and_si512(low ? bytes : _mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
}

// Queries of a head as integers, and what is to be added to their products with the codes of each group of channels.
struct IntegerQuery {
  const int64_t rows, dim, groups;
  float* const scales;   // [rows]
  float* const missing;  // [rows, groups]
  int8_t* const halves;  // [dim / 16, rows, 2, 16]

  static int64_t floats(int64_t rows, int64_t dim, int64_t groups) { return rows * (1 + groups + padded(dim) / 2); }

  IntegerQuery(int64_t rows, int64_t dim, int64_t groups, float* memory)
      : rows(rows), dim(dim), groups(groups), scales(memory), missing(scales + rows),
        halves(reinterpret_cast<int8_t*>(missing + rows * groups)) {}

  // Queries, [rows, dim], and their sums over the channels of each group, [rows, groups].
  void take(const float* query, const float* sums, float middle) {
    for (int64_t n = 0; n < rows; n++, query += dim) {
      Vec most = {}, all = {};
      for (int64_t i = 0; i < dim; i += kWidth) {
        Vec size = (Vec)_mm512_abs_ps((__m512)load(query + i));
        most = maximum(most, size);
        all += size;
      }
      float total = sum(all);
      // A sum of products with codes stays below 2^31. What is not finite makes logits that are none.
      scales[n] = std::max(largest(most) / kLargest, total / (1 << 23));
      if (!(total < std::numeric_limits<float>::infinity())) scales[n] = std::numeric_limits<float>::quiet_NaN();
      int64_t size = dim / groups, block = 32 * rows;
      int8_t* to = halves + 32 * n;
      for (int64_t i = n * groups, first = 0; first < dim; i++, first += size, to += size / 16 * block)
        missing[i] = middle * to_integers(query + first, size, scales[n], sums[i], to, block);
    }
  }
};

// Of N queries from the n-th on with kRows rows, over a part of each: sums of every so manieth row, from the first on,
// then from the second.
template <typename T, int kRows, int N>
inline void add_dots(const IntegerQuery& query, int64_t n, const char* row, int64_t step, Part part,
                     __m512i (&sums)[N][kRows / 4][2]) {
  constexpr int kFours = kRows / 4;
  const int64_t block = 32 * query.rows;
  const int8_t* asked = query.halves + part.channel / 16 * block + 32 * n;
  row += part.at;
  for (int64_t i = 0; i < part.count; i += 16, row += 16, asked += block) {
    __m512i bytes[kFours];
    for (int f = 0; f < kFours; f++) bytes[f] = quarters(row + f * step, kFours * step);
    for (int code = 0; code < kCodes<T>; code++) {
      const int8_t* these = asked + code * (query.dim / 32 * block);
      __m512i some[kFours];
      for (int f = 0; f < kFours; f++) some[f] = codes<T>(bytes[f], code);
      for (int k = 0; k < N; k++)
        for (int half = 0; half < 2; half++) {
          __m512i q = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(these + 32 * k + 16 * half)));
          for (int f = 0; f < kFours; f++) add_products(sums[k][f][half], some[f], q);
        }
    }
  }
}

// Such sums of eight or sixteen rows, in the order of the rows.
inline __m256 in_order(const __m512i (&fours)[2][2]) {
  __m512i even = whole(fours[0]), odd = whole(fours[1]);
  __m512i pairs = _mm512_add_epi32(_mm512_unpacklo_epi32(even, odd), _mm512_unpackhi_epi32(even, odd));
  pairs = _mm512_add_epi32(pairs, _mm512_shuffle_epi32(pairs, _MM_PERM_BADC));
  const __m512i order = _mm512_set_epi64(0, 0, 0, 0, 6, 4, 2, 0);
  return _mm256_cvtepi32_ps(_mm512_castsi512_si256(_mm512_permutexvar_epi64(order, pairs)));
}

inline __m512 in_order(const __m512i (&fours)[4][2]) {
  __m512i a = whole(fours[0]), b = whole(fours[1]), c = whole(fours[2]), d = whole(fours[3]);
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd)));
}

// Of N queries from the n-th on with a group of channels of all rows and up to the next sixteen, over parts of them,
// each of its own type; to[k][r]. Meanwhile other rows are fetched.
template <int N, typename... T>
inline void dots(const IntegerQuery& query, int64_t n, int64_t group, const Sixteens& rows,
                 const Part (&parts)[sizeof...(T)], const Sixteens* fetched, float* to) {
  constexpr int kRows = N <= 3 ? 16 : 8;  // as registers hold
  for (int r = 0; r < rows.count; r += kRows) {
    if (fetched && r % 16 == 0) fetched->fetch(r);
    const char* row = rows[r] + r % 16 * rows.bytes;
    __m512i sums[N][kRows / 4][2] = {};
    int p = 0;
    (add_dots<T, kRows, N>(query, n, row, rows.bytes, parts[p++], sums), ...);
    for (int k = 0; k < N; k++) {
      auto found = in_order(sums[k]) * query.scales[n + k] + query.missing[(n + k) * query.groups + group];
      std::memcpy(to + k * kChunk + r, &found, sizeof found);
    }
  }
}

// Weights of the rows of a chunk, none negative, as integers, for N queries.
template <int N>
struct IntegerWeights {
  int8_t halves[N][kChunk / 16][2][16];
  float scales[N];
  float missing[N];  // what is to be added to every channel

  IntegerWeights(const Weights<N>& weights, int count, float middle) {
    for (int n = 0; n < N; n++) {
      scales[n] = weights.largest[n] / kLargest;
      missing[n] = middle * to_integers(weights.all[n], count, scales[n], weights.sums[n], halves[n][0][0], 32);
    }
  }

  // Those of four rows of sixteen, in every four bytes of a vector.
  __m512i four(int n, int half, int sixteen, int four) const {
    int32_t all;
    std::memcpy(&all, halves[n][sixteen / 16][half] + four, sizeof all);
    return _mm512_set1_epi32(all);
  }
};

// acc[n] += weights[n] times the values, over C times sixteen bytes of them.
template <typename T, int C, int N>
inline void weigh(const Sixteens& rows, const IntegerWeights<N>& weights, int64_t at, const Sixteens* fetched,
                  float* acc, int64_t width) {
  // Byte c of quarter r becomes byte r of channel c.
  const __m512i by_channel = _mm512_set_epi32(
      0x3f2f1f0f, 0x3e2e1e0e, 0x3d2d1d0d, 0x3c2c1c0c, 0x3b2b1b0b, 0x3a2a1a0a, 0x39291909, 0x38281808, 0x37271707,
      0x36261606, 0x35251505, 0x34241404, 0x33231303, 0x32221202, 0x31211101, 0x30201000);
  __m512i sums[C][kCodes<T>][N][2] = {};
  for (int r = 0; r < rows.count; r += 16) {
    if (fetched) fetched->fetch(r);
    const char* row = rows[r] + at;
    for (int four = 0; four < 16; four += 4, row += 4 * rows.bytes) {
      __m512i some[C][kCodes<T>];
      for (int c = 0; c < C; c++) {
        __m512i bytes = _mm512_permutexvar_epi8(by_channel, quarters(row + 16 * c, rows.bytes));
        for (int code = 0; code < kCodes<T>; code++) some[c][code] = codes<T>(bytes, code);
      }
      for (int n = 0; n < N; n++)
        for (int half = 0; half < 2; half++) {
          __m512i w = weights.four(n, half, r, four);
          for (int c = 0; c < C; c++)
            for (int code = 0; code < kCodes<T>; code++) add_products(sums[c][code][n][half], some[c][code], w);
        }
    }
  }
  for (int c = 0; c < C; c++)
    for (int code = 0; code < kCodes<T>; code++)
      for (int n = 0; n < N; n++) {
        float* to = acc + n * width + 16 * c + code * rows.bytes;
        Vec sum = (Vec)_mm512_cvtepi32_ps(whole(sums[c][code][n]));
        store(to, load(to) + sum * weights.scales[n]);
      }
}

// The same over a part of the values; `acc` has all channels. Meanwhile other rows are fetched.
template <typename T, int N>
inline void weigh(const Sixteens& rows, const IntegerWeights<N>& weights, Part part, const Sixteens* fetched,
                  float* acc, int64_t width) {
  constexpr int kMost = (N <= 3 ? 4 : 2) / kCodes<T>;  // as registers hold
  acc += part.channel;
  int64_t i = 0;
  for (; i + 16 * kMost <= part.count; i += 16 * kMost, fetched = nullptr)
    weigh<T, kMost, N>(rows, weights, part.at + i, fetched, acc + i, width);
  for (; i < part.count; i += 16, fetched = nullptr)
    weigh<T, 1, N>(rows, weights, part.at + i, fetched, acc + i, width);
}

#else

constexpr bool kIntegers = false;

struct IntegerQuery {
  static int64_t floats(int64_t, int64_t, int64_t) { return 0; }
  IntegerQuery(int64_t, int64_t, int64_t, float*) {}
  void take(const float*, const float*, float) {}
};

#endif

}  // namespace
}  // namespace HEADWISE_ISA
