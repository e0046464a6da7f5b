// Ragged decode: query rows over each head's own pages and over the fresh rows -> output, log-sum-exp, probabilities.
//
// The rows of all heads, laid end to end, are cut into equal shares, one per thread; a head that a cut goes through is
// put together from partial results (the idea of Flash-Decoding). Every row is read once for the whole group of query
// heads, with an online softmax in fp32 (Milakov and Gimelshein, 2018).
#include <algorithm>
#include <type_traits>
#include <vector>

#include "headwise.h"
#include "vectors.h"

namespace HEADWISE_ISA {
namespace {

using headwise::Decode;

constexpr int64_t kFewLogits = 1 << 15;
constexpr int kChunk = 64;  // rows whose logits are in flight

int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Per query row: the largest logit, the sum of exponentials, and the weighted sum of values.
struct Partial {
  float* top;
  float* sum;
  float* acc;  // [rows, padded(value_dim)]

  static int64_t floats(int64_t rows, int64_t dim) { return 2 * padded(rows) + rows * padded(dim); }

  Partial(float* memory, int64_t rows) : top(memory), sum(memory + padded(rows)), acc(memory + 2 * padded(rows)) {}

  void clear(int64_t rows, int64_t dim) {
    std::fill_n(top, rows, kNone);
    std::fill_n(sum, rows, 0.0f);
    std::fill_n(acc, rows * padded(dim), 0.0f);
  }
};

// Numbers in a line of the processor's cache.
template <typename T>
constexpr int64_t kLine = 64 / int64_t(sizeof(T));

// A few rows of one head, wherever they lie.
template <typename T>
struct Chunk {
  int count = 0;
  const T* keys[kChunk];
  const T* values[kChunk];
  int64_t first;             // index among the head's rows, the fresh ones behind the kept ones
  int64_t columns[kChunk];   // only where there is a mask
};

// Dot products of R keys with N query rows that lie `stride` apart; to[n][r]. The values of the same rows are fetched
// meanwhile: the processor follows the keys by itself, but not two streams in turn.
//
// 32-bit rows are bound by memory and read one after another, as the processor expects; 16-bit rows are bound by
// arithmetic and read side by side, so that each load of the query serves all of them.
template <int R, int N, typename T>
inline void dots(const float* query, int64_t stride, const T* const* keys, const T* const* values, int64_t dim,
                 float* to) {
  Vec acc[R][N];
  int64_t whole = dim / kWidth * kWidth;
  if constexpr (sizeof(T) == 4) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      Vec mine[N] = {};
      for (int64_t i = 0; i < whole; i += kWidth) {
        if (i % kLine<T> == 0) __builtin_prefetch(values[r] + i);
        Vec k = load(keys[r] + i);
        for (int n = 0; n < N; n++) mine[n] += k * load(query + n * stride + i);
      }
      for (int n = 0; n < N; n++) acc[r][n] = mine[n];
    }
  } else {
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) acc[r][n] = Vec{};
    for (int64_t i = 0; i < whole; i += kWidth) {
      Vec q[N];
      for (int n = 0; n < N; n++) q[n] = load(query + n * stride + i);
      for (int r = 0; r < R; r++) {
        if (i % kLine<T> == 0) __builtin_prefetch(values[r] + i);
        Vec k = load(keys[r] + i);
        for (int n = 0; n < N; n++) acc[r][n] += k * q[n];
      }
    }
  }
  for (int n = 0; n < N; n++) {
    if constexpr (R == 4)
      sums(acc[0][n], acc[1][n], acc[2][n], acc[3][n], to + n * kChunk);
    else
      for (int r = 0; r < R; r++) to[n * kChunk + r] = sum(acc[r][n]);
  }
  for (int64_t i = whole; i < dim; i++)
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) to[n * kChunk + r] += scalar(keys[r][i]) * query[n * stride + i];
}

template <int N, typename T>
inline void dots(const float* query, int64_t stride, const Chunk<T>& chunk, int64_t dim, float* to) {
  int r = 0;
  for (; r + 4 <= chunk.count; r += 4) dots<4, N>(query, stride, chunk.keys + r, chunk.values + r, dim, to + r);
  for (; r < chunk.count; r++) dots<1, N>(query, stride, chunk.keys + r, chunk.values + r, dim, to + r);
}

// acc[n] += weights[n][r] times value r, over C vectors of the values and N query rows, which stay in registers.
template <int C, int N, typename T>
inline void weigh(const Chunk<T>& chunk, const float* weights, int64_t at, int64_t width, float* acc) {
  Vec sums[N][C];
  for (int n = 0; n < N; n++)
    for (int c = 0; c < C; c++) sums[n][c] = load(acc + n * width + at + c * kWidth);
  for (int r = 0; r < chunk.count; r++)
    for (int c = 0; c < C; c++) {
      Vec v = load(chunk.values[r] + at + c * kWidth);
      for (int n = 0; n < N; n++) sums[n][c] += v * weights[n * kChunk + r];
    }
  for (int n = 0; n < N; n++)
    for (int c = 0; c < C; c++) store(acc + n * width + at + c * kWidth, sums[n][c]);
}

template <int N, typename T>
inline void weigh(const Chunk<T>& chunk, const float* weights, int64_t dim, int64_t width, float* acc) {
  int64_t i = 0;
  for (; i + 4 * kWidth <= dim; i += 4 * kWidth) weigh<4, N>(chunk, weights, i, width, acc);
  for (; i + kWidth <= dim; i += kWidth) weigh<1, N>(chunk, weights, i, width, acc);
  for (; i < dim; i++)
    for (int r = 0; r < chunk.count; r++)
      for (int n = 0; n < N; n++) acc[n * width + i] += scalar(chunk.values[r][i]) * weights[n * kChunk + r];
}

// Calls `body` with the number of query rows at a time, at most 3: as many as registers hold, with 4 rows.
template <typename Body>
inline void tiled(int64_t rows, Body body) {
  int64_t n = 0;
  for (; n + 3 <= rows; n += 3) body(std::integral_constant<int, 3>(), n);
  if (rows - n == 2) body(std::integral_constant<int, 2>(), n);
  if (rows - n == 1) body(std::integral_constant<int, 1>(), n);
}

template <typename T>
class Worker {
 public:
  explicit Worker(const Decode& args)
      : a(args), rows(args.group * args.queries), key_dim(args.pages.key_dim), value_dim(args.pages.value_dim) {
    heads = a.batch * a.heads;
    partial_floats = Partial::floats(rows, value_dim);
    logit_stride = a.pages.longest + a.fresh.count;
    // Kept from call to call, because asking the system for memory takes longer than a small call.
    static thread_local std::vector<float> memory;
    bool with_mass = a.on_kept || a.on_fresh;
    int64_t weights = a.shares * padded(rows * kChunk), parts = 2 * a.shares * partial_floats;
    int64_t needed = parts + weights + heads * rows * (key_dim + (with_mass ? logit_stride : 0));
    if (int64_t(memory.size()) < needed) memory.resize(needed);
    partials = memory.data();
    chunks = partials + parts;
    query = chunks + weights;
    logits = with_mass ? query + heads * rows * key_dim : nullptr;
    scale();
    total = 0;
    for (int64_t x = 0; x < heads; x++) total += length(x);
  }

  void run() {
    for (int64_t head = 0; head < heads; head++)
      if (length(head) == 0) {
        Partial nothing(partials, rows);
        nothing.clear(rows, value_dim);
        finish(head, nothing);
      }
    parallel([](Worker& w, int64_t share) { w.attend(share); });
    join();
    if (!logits) return;
    // Few exponentials take less time than waking the threads once more.
    if (heads * rows * logit_stride < kFewLogits)
      for (int64_t share = 0; share < a.shares; share++) probabilities(share);
    else
      parallel([](Worker& w, int64_t share) { w.probabilities(share); });
  }

 private:
  // The query in fp32 and in order, scaled.
  void scale() {
    float* to = query;
    const int64_t* s = a.query_strides;
    for (int64_t x = 0; x < heads * rows; x++, to += key_dim) {
      int64_t q = x % a.queries, g = x / a.queries % a.group, h = x / rows % a.heads, b = x / rows / a.heads;
      const T* from = (const T*)a.query + b * s[0] + h * s[1] + g * s[2] + q * s[3];
      for (int64_t i = 0; i < key_dim; i++) to[i] = scalar(from[i]) * a.scaling;
    }
  }

  using Step = void (*)(Worker&, int64_t);

  void parallel(Step step) {
    if (a.shares == 1) return step(*this, 0);
    struct Context {
      Worker* worker;
      Step step;
    } context = {this, step};
    a.parallel_for(
        0, a.shares, 1,
        [](int64_t begin, int64_t end, void* c) {
          auto* context = static_cast<Context*>(c);
          for (int64_t share = begin; share < end; share++) context->step(*context->worker, share);
        },
        &context);
  }

  int64_t length(int64_t head) const { return a.pages.lengths[head] + a.fresh.count; }
  int64_t start(int64_t share) const { return total * share / a.shares; }

  // A share's rows, head by head: whole heads are finished at once, the others go into the share's two partials, the
  // first of which is for a head that began before the share.
  void attend(int64_t share) {
    int64_t begin = start(share), end = start(share + 1), at = 0;
    for (int64_t head = 0; head < heads && at < end; head++) {
      int64_t n = length(head), from = std::max(begin - at, int64_t(0)), to = std::min(end - at, n);
      at += n;
      if (from >= to) continue;
      Partial partial(partials + (2 * share + (from > 0 ? 0 : 1)) * partial_floats, rows);
      partial.clear(rows, value_dim);
      segment(head, from, to, partial, chunks + share * padded(rows * kChunk));
      if (from == 0 && to == n) finish(head, partial);
    }
  }

  void segment(int64_t head, int64_t from, int64_t to, Partial& partial, float* weights) {
    Chunk<T> chunk;
    for (; from < to; from += chunk.count) {
      gather(head, from, to, chunk);
      absorb(head, chunk, partial, weights);
    }
  }

  void gather(int64_t head, int64_t from, int64_t to, Chunk<T>& chunk) const {
    const auto& p = a.pages;
    const auto& f = a.fresh;
    int64_t kept = p.lengths[head], end = std::min(to, from + kChunk), b = head / a.heads, h = head % a.heads, i = from;
    chunk.first = from;
    chunk.count = int(end - from);
    while (i < std::min(end, kept)) {
      int64_t offset = i % p.page_size, last = std::min({end, kept, i - offset + p.page_size});
      int64_t at = p.table[head * p.table_width + i / p.page_size] * p.page_size + offset;
      for (; i < last; i++, at++) {
        chunk.keys[i - from] = (const T*)p.keys + at * key_dim;
        chunk.values[i - from] = (const T*)p.values + at * value_dim;
        if (a.mask) chunk.columns[i - from] = p.columns[at];
      }
    }
    for (; i < end; i++) {
      int64_t j = i - kept;
      chunk.keys[i - from] =
          (const T*)f.keys + b * f.key_strides[0] + h * f.key_strides[1] + j * f.key_strides[2];
      chunk.values[i - from] =
          (const T*)f.values + b * f.value_strides[0] + h * f.value_strides[1] + j * f.value_strides[2];
      if (a.mask) chunk.columns[i - from] = a.mask_columns - f.count + j;
    }
  }

  // Writes minus infinity over the logits of rows that a query may not see.
  void hide(int64_t head, const Chunk<T>& chunk, float* weights) const {
    int64_t kept = a.pages.lengths[head];
    if (!a.mask && chunk.first + chunk.count <= kept) return;
    for (int64_t n = 0; n < rows; n++) {
      int64_t query = n % a.queries;
      const bool* mask = a.mask + head / a.heads * a.mask_strides[0] + query * a.mask_strides[1];
      for (int r = 0; r < chunk.count; r++) {
        bool visible = a.mask ? mask[chunk.columns[r] * a.mask_strides[2]]
                              : chunk.first + r - kept <= a.fresh.count - a.queries + query;
        if (!visible) weights[n * kChunk + r] = kNone;
      }
    }
  }

  void absorb(int64_t head, const Chunk<T>& chunk, Partial& partial, float* weights) {
    const float* asked = query + head * rows * key_dim;
    tiled(rows, [&](auto tile, int64_t n) {
      dots<tile()>(asked + n * key_dim, key_dim, chunk, key_dim, weights + n * kChunk);
    });
    if (a.softcap > 0)
      for (int64_t n = 0; n < rows; n++)
        for (int r = 0; r < chunk.count; r += kWidth) {
          float* x = weights + n * kChunk + r;
          store(x, tangent(load(x) / a.softcap) * a.softcap);
        }
    hide(head, chunk, weights);
    for (int64_t n = 0; n < rows; n++) {
      float* mine = weights + n * kChunk;
      if (logits) std::copy_n(mine, chunk.count, logits + (head * rows + n) * logit_stride + chunk.first);
      int end = (chunk.count + kWidth - 1) / kWidth * kWidth;
      for (int r = chunk.count; r < end; r++) mine[r] = kNone;
      exponentials(partial, n, mine, end);
    }
    tiled(rows, [&](auto tile, int64_t n) {
      int64_t width = padded(value_dim);
      weigh<tile()>(chunk, weights + n * kChunk, value_dim, width, partial.acc + n * width);
    });
  }

  // Logits of one query row become weights relative to its largest logit so far.
  void exponentials(Partial& partial, int64_t n, float* mine, int end) {
    Vec top = load(mine);
    for (int r = kWidth; r < end; r += kWidth) top = maximum(top, load(mine + r));
    float highest = std::max(partial.top[n], largest(top));
    if (highest == kNone) {
      std::fill_n(mine, end, 0.0f);
      return;
    }
    if (highest > partial.top[n]) rescale(partial, n, exponential(partial.top[n] - highest), highest);
    Vec added = {};
    for (int r = 0; r < end; r += kWidth) {
      Vec p = exponential(load(mine + r) - highest);
      added += p;
      store(mine + r, p);
    }
    partial.sum[n] += sum(added);
  }

  void rescale(Partial& partial, int64_t n, float factor, float top) {
    float* acc = partial.acc + n * padded(value_dim);
    for (int64_t i = 0; i < padded(value_dim); i += kWidth) store(acc + i, load(acc + i) * factor);
    partial.sum[n] *= factor;
    partial.top[n] = top;
  }

  void merge(Partial& into, const Partial& from) {
    int64_t width = padded(value_dim);
    for (int64_t n = 0; n < rows; n++) {
      if (from.top[n] == kNone) continue;
      if (from.top[n] > into.top[n]) rescale(into, n, exponential(into.top[n] - from.top[n]), from.top[n]);
      float factor = exponential(from.top[n] - into.top[n]);
      into.sum[n] += factor * from.sum[n];
      for (int64_t i = 0; i < width; i += kWidth)
        store(into.acc + n * width + i, load(into.acc + n * width + i) + load(from.acc + n * width + i) * factor);
    }
  }

  void finish(int64_t head, Partial& partial) {
    int64_t width = padded(value_dim);
    for (int64_t n = 0; n < rows; n++) {
      if (a.sinks) {
        float sink = a.sinks[head % a.heads * a.group + n / a.queries];
        if (sink > partial.top[n]) rescale(partial, n, exponential(partial.top[n] - sink), sink);
        partial.sum[n] += exponential(sink - partial.top[n]);
      }
      bool nothing = partial.sum[n] == 0;
      float share = nothing ? 0 : 1 / partial.sum[n];
      float* to = a.output + (head * rows + n) * value_dim;
      for (int64_t i = 0; i < value_dim; i++) to[i] = partial.acc[n * width + i] * share;
      a.lse[head * rows + n] = nothing ? kNone : partial.top[n] + std::log(partial.sum[n]);
    }
  }

  // Heads that a cut between shares goes through.
  void join() {
    int64_t at = 0;
    for (int64_t head = 0, share = 0; head < heads && share < a.shares; head++) {
      int64_t end = at + length(head);
      while (share < a.shares && start(share + 1) <= at) share++;
      if (share < a.shares && start(share + 1) < end) {
        // It begins in `share`, as the last head there, and goes on in later ones, as the first.
        Partial whole(partials + (2 * share + 1) * partial_floats, rows);
        for (int64_t later = share + 1; later < a.shares && start(later) < end; later++) {
          if (start(later) == start(later + 1)) continue;
          merge(whole, Partial(partials + 2 * later * partial_floats, rows));
        }
        finish(head, whole);
      }
      at = end;
    }
  }

  // Probability of every row, summed over the group, from the logits and the finished log-sum-exp.
  void probabilities(int64_t share) {
    int64_t jobs = heads * a.queries;
    for (int64_t job = jobs * share / a.shares; job < jobs * (share + 1) / a.shares; job++) {
      int64_t head = job / a.queries, query = job % a.queries, kept = a.pages.lengths[head];
      float* on_kept = a.on_kept + job * a.pages.longest;
      float* on_fresh = a.on_fresh + job * a.fresh.count;
      const float *first = logits + (head * rows + query) * logit_stride, *lse = a.lse + head * rows + query;
      summed(first, lse, kept, on_kept);
      std::fill(on_kept + kept, on_kept + a.pages.longest, 0.0f);
      summed(first + kept, lse, a.fresh.count, on_fresh);
    }
  }

  // Of one query position: the group's probabilities of `count` rows, added up.
  void summed(const float* first, const float* lse, int64_t count, float* to) const {
    std::fill_n(to, count, 0.0f);
    for (int64_t g = 0; g < a.group; g++) {
      const float* x = first + g * a.queries * logit_stride;
      float denominator = lse[g * a.queries];
      if (denominator == kNone) continue;
      int64_t i = 0;
      for (; i + kWidth <= count; i += kWidth) store(to + i, load(to + i) + exponential(load(x + i) - denominator));
      for (; i < count; i++) to[i] += exponential(x[i] - denominator);
    }
  }

  const Decode& a;
  const int64_t rows, key_dim, value_dim;
  int64_t heads, partial_floats, logit_stride, total;
  float *partials, *chunks, *query, *logits;
};

}  // namespace

void decode(const Decode* args) {
  switch (args->pages.type) {
    case headwise::kFloat32: return Worker<float>(*args).run();
    case headwise::kBFloat16: return Worker<BFloat16>(*args).run();
    case headwise::kFloat16: return Worker<Float16>(*args).run();
  }
}

}  // namespace HEADWISE_ISA
