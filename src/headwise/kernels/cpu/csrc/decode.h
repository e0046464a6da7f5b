// Ragged decode: query rows over each head's own pages and over the fresh rows -> output, log-sum-exp, probabilities.
//
// The rows of all heads, laid end to end, are cut into equal shares, one per thread; a head that a cut goes through is
// put together from partial results (the idea of Flash-Decoding). Every row is read once for the whole group of query
// heads. A head's rows are taken in the order of the views but for the first, whose numbers come last, so that the fresh
// rows follow them.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "codes.h"
#include "headwise.h"
#include "marks.h"
#include "numbers.h"
#include "pages.h"
#include "partial.h"
#include "products.h"

namespace HEADWISE_ISA {
namespace {

using headwise::Decode;

constexpr int64_t kFewLogits = 1 << 15;

template <typename T>
class Worker {
 public:
  explicit Worker(const Decode& args)
      : a(args), heads(args.batch * args.heads), rows(args.group * args.queries), width(padded(args.value_dim)),
        partial_floats(Partial::floats(rows, width)) {
    kept_stride = scratch_floats = gathered = 0;
    for (int64_t v = 0; v < a.views; v++) kept_stride += a.pages[v].longest;
    for (int64_t v = 1; v < a.views; v++)
      scratch_floats = std::max(scratch_floats, Codes::floats(a.pages[v], rows, a.key_dim, a.value_dim));
    scratch_floats += padded(rows * kChunk);
    for (int64_t v = 0; v < a.views; v++) gathered = std::max(gathered, gathered_bytes(a.pages[v]));
    scratch_floats += gathered / int64_t(sizeof(float));
    logit_stride = kept_stride + a.fresh.count;
    // Kept from call to call, because asking the system for memory takes longer than a small call.
    static thread_local std::vector<float> memory;
    bool with_mass = a.on_kept || a.on_fresh;
    int64_t parts = 2 * a.shares * partial_floats, scratches = a.shares * scratch_floats;
    int64_t needed = parts + scratches + heads * rows * (a.key_dim + (with_mass ? logit_stride : 0));
    if (int64_t(memory.size()) < needed) memory.resize(needed);
    partials = memory.data();
    scratch = partials + parts;
    query = scratch + scratches;
    logits = with_mass ? query + heads * rows * a.key_dim : nullptr;
    scale();
    total = 0;
    for (int64_t x = 0; x < heads; x++) total += length(x);
  }

  headwise::Status run() {
    for (int64_t head = 0; head < heads; head++)
      if (length(head) == 0) {
        Partial nothing = partial(0);
        nothing.clear();
        finish(head, nothing);
      }
    parallel([](Worker& w, int64_t share) { w.attend(share); });
    join();
    if (outside) return headwise::kBadColumn;
    if (!logits) return headwise::kDone;
    // Few exponentials take less time than waking the threads once more.
    if (heads * rows * logit_stride < kFewLogits)
      for (int64_t share = 0; share < a.shares; share++) probabilities(share);
    else
      parallel([](Worker& w, int64_t share) { w.probabilities(share); });
    return headwise::kDone;
  }

 private:
  // The query in fp32 and in order, scaled.
  void scale() {
    float* to = query;
    const int64_t* s = a.query_strides;
    for (int64_t x = 0; x < heads * rows; x++, to += a.key_dim) {
      int64_t q = x % a.queries, g = x / a.queries % a.group, h = x / rows % a.heads, b = x / rows / a.heads;
      const T* from = (const T*)a.query + b * s[0] + h * s[1] + g * s[2] + q * s[3];
      for (int64_t i = 0; i < a.key_dim; i++) to[i] = scalar(from[i]) * a.scaling;
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

  int64_t length(int64_t head) const {
    int64_t length = a.fresh.count;
    for (int64_t v = 0; v < a.views; v++) length += a.pages[v].lengths[head];
    return length;
  }

  int64_t start(int64_t share) const { return total * share / a.shares; }

  Partial partial(int64_t index) const { return Partial(partials + index * partial_floats, rows, width); }

  // A share's rows, head by head: whole heads are finished at once, the others go into the share's two partials, the
  // first of which is for a head that began before the share.
  void attend(int64_t share) {
    int64_t begin = start(share), end = start(share + 1), at = 0;
    for (int64_t head = 0; head < heads && at < end; head++) {
      int64_t n = length(head), from = std::max(begin - at, int64_t(0)), to = std::min(end - at, n);
      at += n;
      if (from >= to) continue;
      Partial found = partial(2 * share + (from > 0 ? 0 : 1));
      found.clear();
      segment(head, from, to, found, scratch + share * scratch_floats);
      if (from == 0 && to == n) finish(head, found);
    }
  }

  void segment(int64_t head, int64_t from, int64_t to, Partial& found, float* weights) {
    const float* asked = query + head * rows * a.key_dim;
    int64_t before = 0;
    for (int64_t v = 1; v < a.views; v++) {
      const Pages& pages = a.pages[v];
      int64_t first = std::max(from, before), last = std::min(to, before + pages.lengths[head]);
      if (first < last) {
        Codes codes(pages, rows, a.key_dim, a.value_dim, weights + padded(rows * kChunk));
        codes.begin(asked);
        read(head, pages, before, first, last, codes, weights);
        found.merge(codes.end());
      }
      before += pages.lengths[head];
    }
    Numbers<T> numbers = {rows, a.key_dim, a.value_dim, asked, found};
    read(head, a.pages[0], before, std::max(from, before), to, numbers, weights);
  }

  // Rows from..to of a head, of which those of the view start at `before`, and fresh rows follow. Which chunk is next
  // is known before one is worked on, so that its rows can be fetched.
  template <typename Rows>
  void read(int64_t head, const Pages& pages, int64_t before, int64_t from, int64_t to, Rows& view, float* weights) {
    Taken taken[2], *now = taken, *next = taken + 1;
    take_rows<Rows>(head, pages, before, from, to, view.one_by_one(), *now);
    for (; from < to; std::swap(now, next)) {
      Chunk& chunk = now->chunk;
      from += chunk.count;
      take_rows<Rows>(head, pages, before, from, to, view.one_by_one(), *next);
      if (gathered) gather(pages, chunk, (char*)weights + scratch_floats * sizeof(float) - gathered);
      view.logits(chunk, weights);
      absorb(head, pages, chunk, now->places, view.partial, weights);
      view.weigh_values(chunk, next->chunk, weights);
    }
  }

  // The rows of a chunk, from the first of them on; none at the end.
  template <typename Rows>
  void take_rows(int64_t head, const Pages& pages, int64_t before, int64_t first, int64_t to, bool one_by_one,
                 Taken& taken) {
    taken.chunk.count = taken.chunk.runs = 0;
    taken.places.first = first;
    taken.places.columns_in_mask = a.mask ? a.mask_columns : std::numeric_limits<int64_t>::max();
    if (first == to) return;
    // The next begins where sixteen rows do, and so most pages.
    int64_t end = std::min(to, first + Rows::kAtATime - (first - before) % 16), kept = before + pages.lengths[head];
    take(head, pages, first - before, std::min(end, kept) - before, one_by_one, a.mask || a.marks.columns, taken);
    take_fresh<T>(a.fresh, head / a.heads, head % a.heads, std::max(first, kept) - kept, end - kept, taken);
    if (taken.places.outside) outside = true;
  }

  // Logits become weights; where probabilities are asked for, the logits are kept.
  void absorb(int64_t head, const Pages& pages, const Chunk& chunk, const Places& places, Partial& found,
              float* weights) {
    if (a.softcap > 0)
      for (int64_t n = 0; n < rows; n++)
        for (int r = 0; r < chunk.count; r += kWidth) {
          float* x = weights + n * kChunk + r;
          store(x, tangent(load(x) / a.softcap) * a.softcap);
        }
    add_biases(pages, chunk, rows, weights);
    if (a.marks.columns) add_marks(a, head, length(head) - a.fresh.count - places.first, chunk, places, weights);
    hide(head, chunk, places, weights);
    for (int64_t n = 0; n < rows; n++) {
      float* mine = weights + n * kChunk;
      if (logits) std::copy_n(mine, chunk.count, logits + (head * rows + n) * logit_stride + places.first);
      std::fill(mine + chunk.count, mine + chunk.end(), kNone);
      found.absorb(n, mine, chunk.end());
    }
  }

  // Writes minus infinity over the logits of rows that a query may not see.
  void hide(int64_t head, const Chunk& chunk, const Places& places, float* weights) const {
    int64_t kept = length(head) - a.fresh.count;
    if (!a.mask && places.first + chunk.count <= kept) return;
    for (int64_t n = 0; n < rows; n++) {
      int64_t query = n % a.queries;
      const bool* mask = a.mask + head / a.heads * a.mask_strides[0] + query * a.mask_strides[1];
      for (int r = 0; r < chunk.count; r++) {
        bool visible = a.mask ? mask[places.columns[r] * a.mask_strides[2]]
                              : places.first + r - kept <= a.fresh.count - a.queries + query;
        if (!visible) weights[n * kChunk + r] = kNone;
      }
    }
  }

  void finish(int64_t head, Partial& found) {
    for (int64_t n = 0; n < rows; n++) {
      if (a.sinks) found.absorb_sink(n, a.sinks[head % a.heads * a.group + n / a.queries]);
      bool nothing = found.sum[n] == 0;
      float share = nothing ? 0 : 1 / found.sum[n];
      float* to = a.output + (head * rows + n) * a.value_dim;
      for (int64_t i = 0; i < a.value_dim; i++) to[i] = found.acc[n * width + i] * share;
      a.lse[head * rows + n] = nothing ? kNone : found.top[n] + std::log(found.sum[n]);
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
        Partial whole = partial(2 * share + 1);
        for (int64_t later = share + 1; later < a.shares && start(later) < end; later++)
          if (start(later) < start(later + 1)) whole.merge(partial(2 * later));
        finish(head, whole);
      }
      at = end;
    }
  }

  // Probability of every row, summed over the group, from the logits and the finished log-sum-exp.
  void probabilities(int64_t share) {
    int64_t jobs = heads * a.queries;
    for (int64_t job = jobs * share / a.shares; job < jobs * (share + 1) / a.shares; job++) {
      int64_t head = job / a.queries, query = job % a.queries;
      const float *first = logits + (head * rows + query) * logit_stride, *lse = a.lse + head * rows + query;
      float *on_kept = a.on_kept + job * kept_stride, *on_view = on_kept + a.pages[0].longest;
      for (int64_t v = 1; v < a.views; v++) {
        const Pages& pages = a.pages[v];
        first = spread(first, lse, pages.lengths[head], pages.longest, on_view);
        on_view += pages.longest;
      }
      first = spread(first, lse, a.pages[0].lengths[head], a.pages[0].longest, on_kept);
      spread(first, lse, a.fresh.count, a.fresh.count, a.on_fresh + job * a.fresh.count);
    }
  }

  // Of one query position: the group's probabilities of `count` rows, added up, and 0 up to `longest`; returns the
  // logits behind them.
  const float* spread(const float* first, const float* lse, int64_t count, int64_t longest, float* to) const {
    std::fill_n(to, longest, 0.0f);
    for (int64_t g = 0; g < a.group; g++) {
      const float* x = first + g * a.queries * logit_stride;
      float denominator = lse[g * a.queries];
      if (denominator == kNone) continue;
      int64_t i = 0;
      for (; i + kWidth <= count; i += kWidth) store(to + i, load(to + i) + exponential(load(x + i) - denominator));
      for (; i < count; i++) to[i] += exponential(x[i] - denominator);
    }
    return first + count;
  }

  const Decode& a;
  const int64_t heads, rows, width, partial_floats;
  int64_t scratch_floats, gathered, kept_stride, logit_stride, total;
  float *partials, *scratch, *query, *logits;
  std::atomic<bool> outside{false};  // whether a row's column is outside of the mask
};

}  // namespace

headwise::Status decode(const Decode* args) {
  for (int64_t v = 0; v < args->views; v++)
    for (int64_t head = 0; head < args->batch * args->heads; head++)
      if (!headwise::inside(args->pages[v], head, 0)) return headwise::kBadPages;
  switch (args->pages[0].type) {
    case headwise::kFloat32: return Worker<float>(*args).run();
    case headwise::kBFloat16: return Worker<BFloat16>(*args).run();
    default: return Worker<Float16>(*args).run();
  }
}

}  // namespace HEADWISE_ISA
