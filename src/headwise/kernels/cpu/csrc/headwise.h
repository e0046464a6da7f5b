// The interface between headwise/kernels/cpu/structs.py and the compiled kernels: plain C structs, filled by ctypes.
//
// Nothing here depends on torch's headers or C++ ABI, so one build serves every torch and every Python. Threads are
// torch's own: `parallel_for` is torch's stable C function of that name.
#pragma once
#include <cstdint>

namespace headwise {

using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

enum Type : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kCodes = 3 };

inline int64_t size_of(int64_t type) { return type == kFloat32 ? 4 : type == kCodes ? 1 : 2; }

// How the codes of the keys, or of the values, are read: headwise.kernels.interface.Coding.
struct Coding {
  const uint16_t* steps;  // [pages, page_size, 2 * groups]: fp16; of a row the steps, then the least numbers
  const float* hadamard;  // [dim, dim]
  int64_t bits, groups;
};

// Pages of one layer: row i of head x lies in page table[x * table_width + i / page_size] at i % page_size.
struct Pages {
  void* keys;        // [pages, page_size, key_width] with the strides below
  void* values;      // [pages, page_size, value_width] likewise
  int32_t* columns;  // [pages, page_size]; null where there is never a mask
  float* scores;     // [pages, page_size], or null
  uint16_t* biases;  // [pages, page_size] in fp16, or null
  const int32_t* table;
  int64_t* lengths;
  int64_t page_count, page_size, table_width, longest;
  int64_t key_width, value_width, type;  // elements of a row: numbers, or bytes of codes
  int64_t key_strides[3], value_strides[3];  // in elements
  Coding key_coding, value_coding;           // only where the type is codes
};

// Rows beside the pages: [batch, heads, fresh, dim], the last dimension contiguous; strides in elements.
struct Fresh {
  const void* keys;
  const void* values;
  int64_t count;
  int64_t key_strides[4], value_strides[4];
};

// Whether a head is as long as is said at most, and lies with so many rows more in pages that there are.
inline bool inside(const Pages& p, int64_t head, int64_t more) {
  int64_t length = p.lengths[head], end = length + more;
  if (length < 0 || length > p.longest || end > p.table_width * p.page_size) return false;
  const int32_t* table = p.table + head * p.table_width;
  for (int64_t i = 0; i * p.page_size < end; i++)
    if (table[i] < 0 || table[i] >= p.page_count) return false;
  return true;
}

// What columns have beside: the query's gate times the mark is added to a logit, behind a soft cap.
struct Marks {
  const float* columns;  // [batch, count]: of the first columns, later ones have 0; null where nothing is marked
  const float* fresh;    // [batch, fresh], or null
  const float* gates;    // [batch, heads, group, queries] with the strides below
  int64_t count, gate_strides[4];
};

struct Decode {
  const Pages* pages;  // [views]: numbers, then codes
  int64_t views;
  Fresh fresh;
  const void* query;   // [batch, heads, group, queries, key_dim] of the numbers' type, strides below
  const bool* mask;    // [batch, queries, columns] with the strides below, or null
  const float* sinks;  // [heads, group], or null
  float* output;       // [batch, heads, group, queries, value_dim]
  float* lse;          // [batch, heads, group, queries]
  float* on_kept;      // [batch, heads, queries, sum of what is longest in each view], or null
  float* on_fresh;     // [batch, heads, queries, fresh], or null
  int64_t batch, heads, group, queries, key_dim, value_dim, shares;
  int64_t query_strides[5];
  int64_t mask_columns, mask_strides[3];
  Marks marks;
  float scaling, softcap;  // softcap 0: none
  ParallelFor parallel_for;
};

struct Append {
  Pages pages;
  Fresh rows;
  const int32_t* columns;   // [fresh]
  const bool* real;         // [batch, fresh], or null
  const float* scores;      // [batch, heads, fresh], or null
  const float* increments;  // [batch, heads, increment_rows] with the stride below, or null
  int64_t batch, heads, increment_rows, increment_stride;  // between the increments of two heads
  ParallelFor parallel_for;
};

struct Range {
  int64_t start, stop;
};

// Query rows of one sequence over whole columns. Strides are in elements; the last dimension is contiguous.
struct Attention {
  const void* query;     // [heads, group, rows, key_dim]
  const void* keys;      // [heads, total, key_dim]
  const void* values;    // [heads, total, value_dim], or null where there is no output
  const int64_t* own;    // [rows]: each query row's own column, ascending
  const bool* mask;      // [rows, total] with the stride below between rows, or null: causal
  const float* sinks;    // [heads, group], or null
  const float* marks;    // [total], or null: the row's gate times it is added to a logit, behind a soft cap
  const float* gates;    // [heads, group, rows] with the strides below
  float* output;         // [heads, group, rows, value_dim], or null
  const float* weights;  // [rows]: of the mass, or null where there is none
  const int64_t* positions;  // [total]
  const int64_t* widths;     // [bands]
  float* mass;               // [heads, group, total]
  float* band;               // [bands, heads, group, total]
  const Range* counted;      // [ranges], at least one: columns of the softmax that peaks are taken from, ascending
  float* peaks;              // [heads, total], or null: the largest probability in any row
  int64_t type, heads, group, rows, total, key_dim, value_dim, bands, ranges;
  int64_t parts, shares;  // that the rows are dealt to, and threads
  int64_t query_strides[3], key_strides[2], value_strides[2], output_strides[3], gate_strides[3], mask_stride;
  float scaling, softcap;  // softcap 0: none
  float* memory;  // to work in, or null to ask how much
  ParallelFor parallel_for;
};

// What a call found: it did all, or it did nothing that counts.
enum Status : int32_t {
  kDone = 0,
  kBadPages = 1,   // a length or an entry of a table is outside of the pages
  kBadColumn = 2,  // a row's column is outside of the mask
};

// The same kernels, compiled for one set of vector instructions.
struct Kernels {
  const char* name;
  Status (*decode)(const Decode*);
  int64_t (*attention)(const Attention*);
};

#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;  // with dot products of bytes (VNNI), as Ice Lake and Zen 4 have them
#endif
extern const Kernels kernels_base;

}  // namespace headwise
