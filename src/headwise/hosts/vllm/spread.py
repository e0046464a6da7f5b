"""Spread: layers that share what stays of a prompt -> rows of every head of all of them, in one another's pages.

Layers are compacted together when the last has read the prompt. A request that was put off goes on in the pass that
reads it again, before its last layer has, so that what was chosen the first time is remembered.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

import torch

from headwise.hosts.vllm.choice import choose_rows
from headwise.hosts.vllm.options import Options
from headwise.hosts.vllm.prompts import Prompt
from headwise.kernels.attention import dense_attention
from headwise.kernels.interface import AttentionMap
from headwise.types import Float, Int, LogitOptions, Tensor

_log = logging.getLogger(__name__)

# Of rows that are remembered: what was put off is read again before many others are.
_MOST_BYTES = 512 * 2**20

Rows = list[list[Tensor]]


class Chosen:
    """Rows that were chosen of the newest prompts."""

    def __init__(self) -> None:
        self._rows: OrderedDict[tuple[Options, tuple[int, ...]], Rows] = OrderedDict()
        self.bytes = 0

    def of(self, options: Options, ids: Sequence[int]) -> Rows | None:
        """By layer and head; None where nothing is known of that prompt."""
        return self._rows.get((options, tuple(ids)))

    def note(self, options: Options, ids: Sequence[int], rows: Rows) -> None:
        """Remember, and forget what was remembered longest."""
        key = options, tuple(ids)
        self.bytes -= _size(key, self._rows.pop(key, []))
        self._rows[key] = [[own.int().cpu() for own in heads] for heads in rows]
        self.bytes += _size(key, self._rows[key])
        while self.bytes > _MOST_BYTES and len(self._rows) > 1:
            self.bytes -= _size(*self._rows.popitem(last=False))


def _size(key: tuple[Options, tuple[int, ...]], rows: Rows) -> int:
    """Bytes, of which a token in a tuple takes about as many as a pointer and a number."""
    return sum(own.nbytes for heads in rows for own in heads) + (36 * len(key[1]) if rows else 0)


def compact(prompt: Prompt, blocks: Int[Tensor, " n"], chosen: Chosen) -> Rows:
    """Choose, and bring together what stays of all layers.

    Args:
        blocks: ids of those that the prompt lies in.
    """
    held = [prompt.held[layer] for layer in range(prompt.layers)]
    together = len({pages.memory for pages in held}) == 1 and held[0].memory is not None
    # An equal prompt may have been chosen from meanwhile, and be put off: it goes on with the rows that it had.
    rows = prompt.before or chosen.of(prompt.options, prompt.ids)
    if rows is None:
        layers = [prompt.summaries[layer] for layer in range(prompt.layers)]
        shared = [layers] if together else [[layer] for layer in layers]
        rows = [heads for own in shared for heads in choose_rows(prompt.options, prompt.blocks, own)]
        chosen.note(prompt.options, prompt.ids, rows)
    prompt.held.clear()
    prompt.summaries.clear()
    # Pages of one layer are written into those of another, which must have been read.
    kept = [_gather(*pages.read(blocks), own) for pages, own in zip(held, rows, strict=True)]
    stay = blocks[: prompt.blocks.stay]
    if together:
        found = prompt.place_all(stay, rows, [pages.place for pages in held])
    else:
        _log.warning("headwise: rows of layers do not lie together in this vLLM; each has the same share")
        found = [prompt.place(layer, stay, heads) for layer, heads in enumerate(rows)]
    for pages, numbers, heads in zip(held, found, kept, strict=True):
        for own, (keys, values) in zip(numbers, heads, strict=True):
            pages.write(own, keys, values)
    return rows


def attend_before(
    prompt: Prompt,
    layer: int,
    query: Float[Tensor, "n h g d"],
    keys: Float[Tensor, "h t d"],
    values: Float[Tensor, "h t d"],
    logits: LogitOptions,
) -> Float[Tensor, "n h g d"]:
    """With tokens behind the prompt, while all of its rows are still there, over those that are going to stay.

    Args:
        keys, values: of all rows so far.
    """
    if prompt.before is None:
        _log.warning("headwise: what was chosen of a prompt that was put off is forgotten; it goes on on all of it")
    found, end = torch.empty_like(query), prompt.blocks.candidates
    for head in range(query.shape[1]):
        rows = torch.arange(end, device="cpu") if prompt.before is None else prompt.before[layer][head].long()
        at = torch.cat([rows, torch.arange(end, keys.shape[1], device="cpu")])
        sinks = None if logits.sinks is None else logits.sinks[head : head + 1]
        own = LogitOptions(logits.scaling, logits.softcap, sinks)
        asked = query[:, head].transpose(0, 1)[None, None]
        output = dense_attention(
            AttentionMap(asked, keys[None, head : head + 1, at], None, own), values[None, head : head + 1, at]
        )
        found[:, head] = output[0, 0].transpose(0, 1)
    return found


def _gather(
    keys: Float[Tensor, "h t d"], values: Float[Tensor, "h t d"], rows: Sequence[Int[Tensor, " rows"]]
) -> list[tuple[Tensor, Tensor]]:
    return [(keys[head, own.long()], values[head, own.long()]) for head, own in enumerate(rows)]
