"""Mutants by hand: mistakes that could be made in the kernels that no Python tool mutates, as text to replace.

The old text must occur exactly once in its file, or the mutant says nothing and `tools/mutate.py` refuses to run.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One text of one file of `src/headwise/kernels` for another."""

    file: str
    what: str
    old: str
    new: str


CPU = (
    Mistake(
        "cpu/csrc/pages.h",
        "off by one in a page",
        "int64_t offset = i % p.page_size;",
        "int64_t offset = (i + 1) % p.page_size;",
    ),
    Mistake(
        "cpu/csrc/pages.h",
        "the table of the first head",
        "p.table + head * p.table_width + i / p.page_size;",
        "p.table + i / p.page_size;",
    ),
    Mistake(
        "cpu/csrc/decode.h",
        "the length of the next head",
        "length += a.pages[v].lengths[head];",
        "length += a.pages[v].lengths[(head + 1) % heads];",
    ),
    Mistake(
        "cpu/csrc/decode.h",
        "the mask of the first sequence",
        "a.mask + head / a.heads * a.mask_strides[0] + query",
        "a.mask + query",
    ),
    Mistake(
        "cpu/csrc/decode.h",
        "fresh rows that are not causal",
        "<= a.fresh.count - a.queries + query;",
        "<= a.fresh.count - a.queries + query + 1;",
    ),
    Mistake(
        "cpu/csrc/decode.h",
        "a head that spans three threads loses a part",
        "later < a.shares && start(later) < end; later++)",
        "later < std::min(share + 2, a.shares) && start(later) < end; later++)",
    ),
    Mistake(
        "cpu/csrc/decode.h",
        "the sink of the first query head",
        "a.sinks[head % a.heads * a.group + n / a.queries]",
        "a.sinks[head % a.heads * a.group]",
    ),
    Mistake(
        "cpu/csrc/code_reader.h",
        "steps of the first rows of sixteen",
        "(rows[r]) + r % 16 * 2 * groups;",
        "(rows[r]);",
    ),
    Mistake(
        "cpu/csrc/codes.h",
        "the least number of the first group",
        "load(least + r) * sums[(n + k) * keys.groups + group]",
        "load(least + r) * sums[(n + k) * keys.groups]",
    ),
    Mistake(
        "cpu/csrc/code_reader.h",
        "high halves that begin one channel late",
        "return {start - dim / 2, start, ",
        "return {start - dim / 2 + (start > dim / 2), start, ",
    ),
    Mistake(
        "cpu/csrc/chunk.h",
        "sixteen rows that are said to be of one page, though the last is not",
        "r + 16 <= begin + chunk.run[run].count) continue;",
        "r + 15 <= begin + chunk.run[run].count) continue;",
    ),
    Mistake(
        "cpu/csrc/integers.h",
        "upper halves that are not rounded",
        "_mm512_add_epi32(x, _mm512_set1_epi32(128))",
        "_mm512_add_epi32(x, _mm512_set1_epi32(127))",
    ),
    Mistake(
        "cpu/csrc/integers.h",
        "what rounding took from a query is left out",
        "query.missing[(n + k) * query.groups + group]",
        "0",
    ),
    Mistake(
        "cpu/csrc/codes.h",
        "what rounding took from the weights is left out",
        "+= by.missing[k];",
        "+= 0;",
    ),
    Mistake(
        "cpu/csrc/integers.h",
        "the scale of the first query",
        "query.scales[n + k]",
        "query.scales[n]",
    ),
    Mistake(
        "cpu/csrc/attention.h",
        "a prompt's row that is no number is hidden",
        "if (top == kNone && any_nan(x, logits.count)) top = 0;",
        "",
    ),
    Mistake(
        "cpu/csrc/partial.h",
        "what is no number is hidden",
        "if (!any_nan(logits, count)) {",
        "if (true) {",
    ),
    Mistake(
        "cpu/csrc/partial.h",
        "a sum that does not decay when the maximum rises",
        "    sum[n] *= factor;\n",
        "",
    ),
    Mistake(
        "cpu/csrc/column_mass.h",
        "a band one position too wide",
        "positions + seen, position - width) - positions",
        "positions + seen, position - width - 1) - positions",
    ),
    Mistake(
        "cpu/csrc/attention_peaks.h",
        "a range that reads past what a row sees",
        "std::min(row.count, range.stop) - range.start)",
        "range.stop - range.start)",
    ),
    Mistake(
        "cpu/csrc/attention.h",
        "a query that does not see itself",
        "seen : a.own[row] + 1,",
        "seen : a.own[row],",
    ),
    Mistake(
        "cpu/csrc/attention.h",
        "columns behind the last that the first row of a block sees",
        "      seen = last;\n",
        "      seen = row == first ? last : seen;\n",
    ),
    Mistake(
        "cpu/csrc/attention.h",
        "products with values that begin anew in every block of them",
        "from > 0, sum",
        "false, sum",
    ),
    Mistake(
        "cpu/csrc/attention.h",
        "the factor of the row before",
        "to[i] = sum[m * width + i] * factor[m];",
        "to[i] = sum[m * width + i] * factor[m ? m - 1 : 0];",
    ),
    Mistake(
        "cpu/csrc/attention.h",
        "what the last part found is left out",
        "for (int64_t part = 1; part < a.parts; part++) add_scaled",
        "for (int64_t part = 1; part < a.parts - 1; part++) add_scaled",
    ),
    Mistake(
        "cpu/csrc/tiles.h",
        "the last rows of a tile that is not full",
        "case 5: multiply<5>",
        "case 5: multiply<4>",
    ),
    Mistake(
        "cpu/csrc/tiles.h",
        "rows behind the last as they lie in memory",
        "int64_t dim = row < from.end ? from.dim : 0;",
        "int64_t dim = from.dim;",
    ),
    Mistake(
        "cpu/csrc/library.cpp",
        "increments that reach only the first page",
        "float* scores = p.scores + table[i / p.page_size] * p.page_size;",
        "float* scores = p.scores + table[0] * p.page_size;",
    ),
    Mistake(
        "cpu/csrc/library.cpp",
        "padding that is appended",
        "if (a.real && !a.real[b * a.rows.count + i]) continue;",
        "if (a.real && !a.real[i]) continue;",
    ),
)

TRITON = (
    Mistake(
        "triton/device_pages.py",
        "the length of the first head",
        "length = tl.load(lengths + b * length_stride[0] + h * length_stride[1])",
        "length = tl.load(lengths + b * length_stride[0])",
    ),
    Mistake(
        "triton/device_tiles.py",
        "fresh rows that are not causal",
        "visible & (f[None, :] <= fresh - queries + query_row[:, None])",
        "visible & (f[None, :] <= fresh - queries + 1 + query_row[:, None])",
    ),
    Mistake(
        "triton/device_codes.py",
        "steps of the first row of a page",
        "row = steps + address[:, None] * (2 * GROUPS) + (channel // SIZE)[None, :]",
        "row = steps + (address // 16 * 16)[:, None] * (2 * GROUPS) + (channel // SIZE)[None, :]",
    ),
    Mistake(
        "triton/device_tiles.py",
        "a stale table: every page is the head's first",
        "page = tl.load(table + n // PAGE, mask=held, other=0)\n    return page.to(tl.int64) * STRIDES",
        "page = tl.load(table + n * 0, mask=held, other=0)\n    return page.to(tl.int64) * STRIDES",
    ),
    Mistake(
        "triton/device_map.py",
        "a band one position too wide",
        "own[:, None] - position[None, :] < width, received",
        "own[:, None] - position[None, :] <= width, received",
    ),
)
