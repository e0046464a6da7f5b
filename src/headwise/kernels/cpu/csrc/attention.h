// Attention of many query rows over whole columns -> its output, and what every column gets from all of them.
//
// One head of keys at a time: its rows are packed once, then blocks of query rows of its whole group go through the
// products with keys, the softmax and the products with values, while their probabilities lie in the processor's cache.
// So what columns get costs an addition per probability. Blocks are dealt to more parts than there are threads, which
// take a part when they are done with one; sums stand apart by part, so that they do not depend on who was faster.
#include <algorithm>
#include <atomic>

#include "attention_peaks.h"
#include "column_mass.h"
#include "headwise.h"
#include "rows.h"
#include "tiles.h"

namespace HEADWISE_ISA {
namespace {

using headwise::Attention;

// Probabilities of a block, which should fit the second-level cache of one processor.
constexpr int64_t kBlockFloats = 96 * 1024;
// Query rows of a block, of all heads of the group: more of them read packed keys and values more rarely.
constexpr int64_t kFewest = 24, kMost = 96;
// Values that stay in the first-level cache while all rows of a block take from them.
constexpr int64_t kValueRows = 64;

template <typename T>
class Attend {
 public:
  explicit Attend(const Attention& args)
      : a(args), room(tiled(a.total)), width(a.output ? tiled(a.value_dim) : 0), lanes(a.group) {
    int64_t most = std::clamp(kBlockFloats / std::max<int64_t>(room, 1), kFewest, kMost);
    step = std::max<int64_t>(1, most / lanes);
    mass_floats = a.weights ? (1 + a.bands) * lanes * a.total : 0;
    int64_t block = a.shares * step * lanes;
    floats = 0;
    auto take = [&](int64_t count) {
      float* taken = a.memory ? a.memory + floats : nullptr;
      floats += (count + 15) / 16 * 16;
      return taken;
    };
    keys = take(room * a.key_dim);
    values = take(room * width);
    queries = take(block * a.key_dim);
    products = take(block * apart(room));
    sums = take(block * width);
    factors = take(block);
    mass = take(a.parts * mass_floats);
    peaks = take(a.peaks ? a.parts * a.total : 0);
  }

  int64_t floats;  // that it needs

  void run() {
    for (head = 0; head < a.heads; head++) {
      everywhere(room / kTileColumns, [](Attend& w, int64_t tile, int64_t) { w.pack_tile(tile); });
      std::fill_n(mass, a.parts * mass_floats, 0.0f);
      if (a.peaks) std::fill_n(peaks, a.parts * a.total, kNone);
      everywhere(a.parts, [](Attend& w, int64_t part, int64_t share) { w.attend(part, share); });
      gather();
    }
  }

 private:
  // Rows lie so far apart that a column of them does not fall into the same places of the cache.
  static int64_t apart(int64_t end) { return end + kTileColumns; }

  using Step = void (*)(Attend&, int64_t unit, int64_t share);

  // Threads take one unit after the other.
  void everywhere(int64_t units, Step step) {
    struct Context {
      Attend* worker;
      Step step;
      int64_t units;
      std::atomic<int64_t> next;
    } context = {this, step, units, {0}};
    auto body = [](int64_t begin, int64_t end, void* c) {
      auto& context = *static_cast<Context*>(c);
      for (int64_t share = begin; share < end; share++)
        for (int64_t unit; (unit = context.next++) < context.units;) context.step(*context.worker, unit, share);
    };
    if (a.shares == 1) return body(0, 1, &context);
    a.parallel_for(0, a.shares, 1, body, &context);
  }

  void pack_tile(int64_t tile) {
    int64_t first = tile * kTileColumns;
    Source<T> from = {(const T*)a.keys + head * a.key_strides[0], a.key_strides[1], a.total, a.key_dim};
    pack_across(from, first, keys + first * a.key_dim);
    if (!a.output) return;
    from = {(const T*)a.values + head * a.value_strides[0], a.value_strides[1], a.total, a.value_dim};
    pack(from, first, width, values + first * width);
  }

  // Every so manieth block; the latest ones, which see most, first.
  void attend(int64_t part, int64_t share) {
    int64_t blocks = (a.rows + step - 1) / step;
    for (int64_t i = part; i < blocks; i += a.parts) {
      int64_t first = (blocks - 1 - i) * step;
      attend_block(first, std::min(step, a.rows - first), part, share);
    }
  }

  void attend_block(int64_t first, int64_t rows, int64_t part, int64_t share) {
    int64_t all = rows * lanes, seen = a.mask ? last_visible(first, rows) : a.own[first + rows - 1] + 1;
    int64_t end = tiled(seen), stride = apart(end);
    float *asked = queries + share * step * lanes * a.key_dim, *x = products + share * step * lanes * apart(room);
    for (int64_t g = 0; g < lanes; g++)
      for (int64_t r = 0; r < rows; r++, asked += a.key_dim) {
        const T* from = (const T*)a.query + head * a.query_strides[0] + g * a.query_strides[1] +
                        (first + r) * a.query_strides[2];
        widen(from, a.scaling, a.key_dim, asked);
      }
    asked -= all * a.key_dim;
    for (int64_t tile = 0; tile < end; tile += kTileColumns)
      multiply(all, asked, a.key_dim, keys + tile * a.key_dim, kTileColumns, a.key_dim, false, x + tile, stride);
    float* factor = factors + share * step * lanes;
    for (int64_t g = 0; g < lanes; g++)
      for (int64_t r = 0; r < rows; r++)
        factor[g * rows + r] = softmax(x + (g * rows + r) * stride, seen, g, first + r, part);
    if (a.output) weigh(first, rows, x, end, factor, share);
    if (a.weights) add_mass(first, rows, x, seen, end, factor, part);
  }

  // Columns up to the last that any of the rows sees.
  int64_t last_visible(int64_t first, int64_t rows) const {
    int64_t seen = 1;  // there is a tile, even if all of it is hidden
    for (int64_t row = first; row < first + rows; row++) {
      const bool* visible = a.mask + row * a.mask_stride;
      int64_t last = a.total;
      while (last > seen && !visible[last - 1]) last--;
      seen = last;
    }
    return seen;
  }

  // Products of a row become exponentials; returns what makes probabilities of them, 0 for a row of zeros.
  float softmax(float* x, int64_t seen, int64_t g, int64_t row, int64_t part) {
    int64_t end = tiled(seen);
    const bool* visible = a.mask ? a.mask + row * a.mask_stride : nullptr;
    float gate = a.marks ? a.gates[head * a.gate_strides[0] + g * a.gate_strides[1] + row * a.gate_strides[2]] : 0;
    Logits logits = {x, a.mask ? seen : a.own[row] + 1, a.sinks ? a.sinks[head * lanes + g] : kNone};
    float top = kNone;
    if (a.output || a.peaks || a.weights[row] != 0) {
      make_logits(logits, end, {visible, a.marks, gate, a.softcap});
      if (a.peaks) raise_peaks(logits, a.counted, a.ranges, peaks + part * a.total);
      top = top_of(logits);
      // Comparisons pass over what is no number: it is not hidden, and makes an output that is none.
      if (top == kNone && any_nan(x, logits.count)) top = 0;
    }
    if (top == kNone) {
      std::fill_n(x, end, 0.0f);
      return 0;
    }
    float total = exponentials<true>(logits, top);
    std::fill(x + logits.count, x + end, 0.0f);
    return 1 / total;
  }

  // Of the block's exponentials the products with values, and those times the factors to the output.
  void weigh(int64_t first, int64_t rows, const float* x, int64_t end, const float* factor, int64_t share) {
    int64_t all = rows * lanes;
    float* sum = sums + share * step * lanes * width;
    for (int64_t from = 0; from < end; from += kValueRows)
      for (int64_t channel = 0; channel < width; channel += kTileColumns)
        multiply(all, x + from, apart(end), values + from * width + channel, width, std::min(kValueRows, end - from),
                 from > 0, sum + channel, width);
    for (int64_t m = 0; m < all; m++) {
      float* to = a.output + head * a.output_strides[0] + m / rows * a.output_strides[1] +
                  (first + m % rows) * a.output_strides[2];
      for (int64_t i = 0; i < a.value_dim; i++) to[i] = sum[m * width + i] * factor[m];
    }
  }

  void add_mass(int64_t first, int64_t rows, const float* x, int64_t seen, int64_t end, float* factor, int64_t part) {
    for (int64_t g = 0; g < lanes; g++, x += rows * apart(end), factor += rows) {
      for (int64_t r = 0; r < rows; r++) factor[r] *= a.weights[first + r];
      float* to = mass + part * mass_floats + g * a.total;
      add_rows(x, apart(end), factor, rows, 0, seen, to);
      for (int64_t w = 0; w < a.bands; w++)
        add_band(x, apart(end), factor, a.own + first, rows, seen, a.positions, a.widths[w],
                 to + (w + 1) * lanes * a.total);
    }
  }

  // What the parts found of one head becomes its own.
  void gather() {
    int64_t count = lanes * a.total;
    for (int64_t w = 0; w <= a.bands && a.weights; w++) {
      float* to = w ? a.band + ((w - 1) * a.heads + head) * count : a.mass + head * count;
      std::copy_n(mass + w * count, count, to);
      for (int64_t part = 1; part < a.parts; part++) add_scaled(mass + part * mass_floats + w * count, 1, count, to);
    }
    if (!a.peaks) return;
    float* to = a.peaks + head * a.total;
    for (int64_t i = 0; i < a.total; i++) {
      float best = kNone;
      for (int64_t part = 0; part < a.parts; part++) best = std::max(best, peaks[part * a.total + i]);
      to[i] = best == kNone ? 0 : exponential(best);
    }
  }

  const Attention& a;
  int64_t room, width, lanes, step, mass_floats, head;
  float *keys, *values, *queries, *products, *sums, *factors, *mass, *peaks;
};

}  // namespace

// How many floats it needs where no memory is given; else it does it.
int64_t attention(const Attention* args) {
  auto on = [&](auto attend) {
    if (args->memory) attend.run();
    return attend.floats;
  };
  if (args->type == headwise::kFloat32) return on(Attend<float>(*args));
  if (args->type == headwise::kBFloat16) return on(Attend<BFloat16>(*args));
  return on(Attend<Float16>(*args));
}

}  // namespace HEADWISE_ISA
