// Vectors of floats as wide as the instruction set this file is compiled for; GCC's and Clang's vector extension.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace HEADWISE_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

// The logit of what is hidden.
constexpr float kNone = -std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kWidth * 2)));
typedef uint8_t ByteVec __attribute__((vector_size(kWidth)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// A code of 8 bits, or of the 4 in one half of a byte.
struct Byte {
  uint8_t bits;
};
struct LowHalf {
  uint8_t bits;
};
struct HighHalf {
  uint8_t bits;
};

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline Vec load(const BFloat16* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
  HalfVec half;
  std::memcpy(&half, from, sizeof half);
  return (Vec)(__builtin_convertvector(half, IntVec) << 16);
#endif
}

inline Vec load(const Float16* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__) && defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  HalfVec half;
  std::memcpy(&half, from, sizeof half);
  IntVec bits = __builtin_convertvector(half, IntVec);
  // The exponent is rebiased by a multiplication, which also turns denormals into normal numbers.
  Vec magnitude = (Vec)((bits & 0x7fff) << 13) * 0x1p112f;
  IntVec special = ((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return (Vec)((IntVec)magnitude | special | ((bits & 0x8000) << 16));
#endif
}

inline IntVec load_bytes(const void* from) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (IntVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  ByteVec bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, IntVec);
#endif
}

inline Vec load(const Byte* from) { return __builtin_convertvector(load_bytes(from), Vec); }
inline Vec load(const LowHalf* from) { return __builtin_convertvector(load_bytes(from) & 15, Vec); }
inline Vec load(const HighHalf* from) { return __builtin_convertvector(load_bytes(from) >> 4, Vec); }

inline float scalar(float x) { return x; }
inline float scalar(Byte x) { return x.bits; }
inline float scalar(LowHalf x) { return x.bits & 15; }
inline float scalar(HighHalf x) { return x.bits >> 4; }

inline float scalar(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline float scalar(Float16 x) {
  Float16 padded[kWidth] = {x};
  return load(padded)[0];
}

#if defined(__clang__) || __GNUC__ >= 12
#define HEADWISE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define HEADWISE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (IntVec){__VA_ARGS__})
#endif

// Halves are added until one number is left: one after another, each addition would wait for the one before it.
inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  v += HEADWISE_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += HEADWISE_SHUFFLE(v, v, 2, 3, 0, 1, 2, 3, 0, 1);
  return v[0] + v[1];
#else
  v += HEADWISE_SHUFFLE(v, v, 2, 3, 0, 1);
  return v[0] + v[1];
#endif
}

// The sums of four vectors, one behind the other.
inline void sums(Vec a, Vec b, Vec c, Vec d, float* to) {
#if defined(__AVX512F__)
  // In each quarter of a vector first, then the quarters.
  auto pairs = [](Vec x, Vec y) {
    return _mm512_add_ps(_mm512_unpacklo_ps((__m512)x, (__m512)y), _mm512_unpackhi_ps((__m512)x, (__m512)y));
  };
  __m512 ab = pairs(a, b), cd = pairs(c, d);
  __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
#if defined(__AVX2__)
  Vec ab = HEADWISE_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + HEADWISE_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  Vec cd = HEADWISE_SHUFFLE(c, d, 0, 8, 1, 9, 4, 12, 5, 13) + HEADWISE_SHUFFLE(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
  Vec all = HEADWISE_SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + HEADWISE_SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  all += HEADWISE_SHUFFLE(all, all, 4, 5, 6, 7, 0, 1, 2, 3);
#else
  Vec ab = HEADWISE_SHUFFLE(a, b, 0, 4, 1, 5) + HEADWISE_SHUFFLE(a, b, 2, 6, 3, 7);
  Vec cd = HEADWISE_SHUFFLE(c, d, 0, 4, 1, 5) + HEADWISE_SHUFFLE(c, d, 2, 6, 3, 7);
  Vec all = HEADWISE_SHUFFLE(ab, cd, 0, 1, 4, 5) + HEADWISE_SHUFFLE(ab, cd, 2, 3, 6, 7);
#endif
  std::memcpy(to, &all, 4 * sizeof(float));
#endif
}

// Two vectors of pairs: their first numbers, and their second ones.
inline void apart(Vec a, Vec b, float* first, float* second) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  store(first, (Vec)_mm512_permutex2var_ps((__m512)a, even, (__m512)b));
  store(second, (Vec)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), (__m512)b));
#elif defined(__AVX2__)
  store(first, HEADWISE_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14));
  store(second, HEADWISE_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15));
#else
  store(first, HEADWISE_SHUFFLE(a, b, 0, 2, 4, 6));
  store(second, HEADWISE_SHUFFLE(a, b, 1, 3, 5, 7));
#endif
}

inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

inline float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX2__)
  v = maximum(v, HEADWISE_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = maximum(v, HEADWISE_SHUFFLE(v, v, 2, 3, 0, 1, 2, 3, 0, 1));
  return v[0] > v[1] ? v[0] : v[1];
#else
  v = maximum(v, HEADWISE_SHUFFLE(v, v, 2, 3, 0, 1));
  return v[0] > v[1] ? v[0] : v[1];
#endif
}

inline bool any_nan(const float* x, int64_t count) {
  bool any = false;
  for (int64_t i = 0; i < count; i++) any |= x[i] != x[i];
  return any;
}

inline Vec broadcast(float x) { return x - Vec{}; }

// exp to 1e-7, relative; 0 below -87, minus infinity included. Range reduction by powers of 2, then the polynomial of
// degree 6 whose largest relative error on |r| <= ln(2) / 2 is least, 2e-9 (by Remez's exchange).
inline Vec exponential(Vec x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
#if !defined(__AVX512F__)
  IntVec vanishes = x < -87.0f;
  x = vanishes ? Vec{} : x;
  x = x > 88.0f ? broadcast(88.0f) : x;
#endif
  Vec n = (x * 1.44269504f + magic) - magic;
  Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.38368353e-3f + 8.37482419e-3f;
  p = p * r + 4.16682251e-2f;
  p = p * r + 1.66664198e-1f;
  p = p * r + 4.99999911e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  __mmask16 stays = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(stays, (__m512)p, (__m512)n);
#else
  IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return vanishes ? Vec{} : p * (Vec)power;
#endif
}

inline float exponential(float x) { return exponential(broadcast(x))[0]; }

inline Vec tangent(Vec x) {
  // Beyond 10 the hyperbolic tangent is 1 in fp32.
  x = x > 10.0f ? broadcast(10.0f) : x;
  x = x < -10.0f ? broadcast(-10.0f) : x;
  return 1.0f - 2.0f / (exponential(x * 2.0f) + 1.0f);
}

}  // namespace HEADWISE_ISA
