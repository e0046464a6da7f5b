// What the shared library exports: the choice of vector instructions, and the calls that ctypes makes.
#include <algorithm>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "headwise.h"

namespace {

using namespace headwise;

// From the narrowest; the last that this processor has is used.
const Kernels* const kAll[] = {
    &kernels_base,
#if defined(__x86_64__)
    &kernels_avx2,
    &kernels_avx512,
#endif
};

#if defined(__x86_64__)
// Clang 14 knows no such name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool has(const Kernels* kernels) {
#if defined(__x86_64__)
#define HEADWISE_HAS(name) __builtin_cpu_supports(name)
  bool avx2 = HEADWISE_HAS("avx2") && HEADWISE_HAS("fma") && has_f16c();
  if (kernels == &kernels_avx2) return avx2;
  if (kernels == &kernels_avx512)
    return avx2 && HEADWISE_HAS("avx512f") && HEADWISE_HAS("avx512bw") && HEADWISE_HAS("avx512dq") &&
           HEADWISE_HAS("avx512vl") && HEADWISE_HAS("avx512vbmi") && HEADWISE_HAS("avx512vnni");
#undef HEADWISE_HAS
#endif
  return true;
}

const Kernels* chosen = &kernels_base;

// Writes a row of `width` elements to its place in a pool.
void put(void* pool, const int64_t (&strides)[3], int64_t page, int64_t offset, const char* row, int64_t width,
         int64_t element) {
  char* to = (char*)pool + (page * strides[0] + offset * strides[1]) * element;
  if (strides[2] == 1) {
    std::memcpy(to, row, width * element);
    return;
  }
  for (int64_t i = 0; i < width; i++) std::memcpy(to + i * strides[2] * element, row + i * element, element);
}

void append_head(const Append& a, int64_t head) {
  const Pages& p = a.pages;
  int64_t b = head / a.heads, h = head % a.heads, length = p.lengths[head], element = size_of(p.type);
  const int32_t* table = p.table + head * p.table_width;
  if (a.increments) {
    const float* more = a.increments + head * a.increment_stride;
    for (int64_t i = 0; i < length; i += p.page_size) {
      float* scores = p.scores + table[i / p.page_size] * p.page_size;
      int64_t count = std::min(length - i, p.page_size);
      for (int64_t r = 0; r < count; r++) scores[r] += more[i + r];
    }
  }
  for (int64_t i = 0; i < a.rows.count; i++) {
    if (a.real && !a.real[b * a.rows.count + i]) continue;
    int64_t page = table[length / p.page_size], offset = length % p.page_size, at = page * p.page_size + offset;
    const auto &ks = a.rows.key_strides, &vs = a.rows.value_strides;
    put(p.keys, p.key_strides, page, offset, (const char*)a.rows.keys + (b * ks[0] + h * ks[1] + i * ks[2]) * element,
        p.key_width, element);
    put(p.values, p.value_strides, page, offset,
        (const char*)a.rows.values + (b * vs[0] + h * vs[1] + i * vs[2]) * element, p.value_width, element);
    if (p.columns) p.columns[at] = a.columns[i];
    if (p.scores) p.scores[at] = a.scores[head * a.rows.count + i];
    if (p.biases) p.biases[at] = 0;
    length++;
  }
  p.lengths[head] = length;
}

// Rows that come into a sequence.
int64_t coming(const Append& a, int64_t sequence) {
  if (!a.real) return a.rows.count;
  const bool* real = a.real + sequence * a.rows.count;
  return std::count(real, real + a.rows.count, true);
}

// Independent sums, so that the additions do not wait for one another.
uint64_t summed(const uint64_t* from, int64_t count) {
  uint64_t sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; j++) sums[j] += from[i + j];
  for (; i < count; i++) sums[0] += from[i];
  for (int j = 1; j < 8; j++) sums[0] += sums[j];
  return sums[0];
}

struct Read {
  const uint64_t* from;
  int64_t count, shares;
  uint64_t* sums;
};

}  // namespace

#define HEADWISE_EXPORT extern "C" __attribute__((visibility("default")))

// Names of the vector instructions this processor has, separated by spaces, the best last; takes the named ones into
// use, or the best for an empty name.
HEADWISE_EXPORT const char* headwise_vectors(const char* wanted) {
  static char names[64];
  names[0] = 0;
  for (const Kernels* kernels : kAll) {
    if (!has(kernels)) continue;
    if (names[0]) std::strcat(names, " ");
    std::strcat(names, kernels->name);
    if (!wanted[0] || !std::strcmp(wanted, kernels->name)) chosen = kernels;
  }
  return names;
}

HEADWISE_EXPORT const char* headwise_chosen() { return chosen->name; }

HEADWISE_EXPORT int32_t headwise_decode(const Decode* args) { return chosen->decode(args); }

HEADWISE_EXPORT int64_t headwise_attention(const Attention* args) { return chosen->attention(args); }

HEADWISE_EXPORT int32_t headwise_append(const Append* args) {
  int64_t heads = args->batch * args->heads;
  for (int64_t head = 0; head < heads; head++)
    if (!inside(args->pages, head, coming(*args, head / args->heads))) return kBadPages;
  // A thread is worth waking only for more than it takes to wake it.
  int64_t grain = args->increments || args->rows.count > 8 ? 8 : heads;
  args->parallel_for(
      0, heads, grain,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t head = begin; head < end; head++) append_head(*static_cast<const Append*>(context), head);
      },
      const_cast<Append*>(args));
  return kDone;
}

// Reads a buffer once with all threads, for the bandwidth; `sums` has one number per share.
HEADWISE_EXPORT void headwise_read(const uint64_t* from, int64_t count, int64_t shares, uint64_t* sums,
                                   ParallelFor parallel_for) {
  Read read = {from, count, shares, sums};
  parallel_for(
      0, shares, 1,
      [](int64_t begin, int64_t end, void* context) {
        auto& r = *static_cast<Read*>(context);
        for (int64_t s = begin; s < end; s++) {
          int64_t first = r.count * s / r.shares;
          r.sums[s] = summed(r.from + first, r.count * (s + 1) / r.shares - first);
        }
      },
      &read);
}
