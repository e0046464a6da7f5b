"""Kernels captured: attention and append of one token -> a CUDA graph that is replayed, against the reference's steps.

The graph is recorded once, over views that are as long as their pages have room; lengths and rows live on the device.
On a CPU the step is run again instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from headwise.hosts.transformers.graph import cuda_graph
from headwise.kernels import reference
from headwise.kernels.interface import AppendRequest, DecodeRequest, Kernels
from headwise.quant.formats import RowFormat
from headwise.types import LogitOptions, Tensor
from kernel_inputs import coded_pages, content_of, filled, strided
from on_gpu.cases import Case, Figures, Setting
from on_gpu.compare import CODED_OUTPUT, Pair, compare

_TOKENS = 20
_LENGTHS, _CODED = [[4000, 1, 700, 0], [17, 2000, 64, 33]], [[500, 0, 2000, 3], [64, 0, 1, 4000]]
_TINY, _TINY_CODED = [[14, 1]], [[0, 33]]


@dataclass(frozen=True)
class Captured:
    """One step of a layer.

    Attributes:
        formats: of older rows.
        scored: whether rows carry scores, to which every token adds.
    """

    dtype: torch.dtype = torch.bfloat16
    formats: tuple[RowFormat, ...] = ()
    scored: bool = False
    dim: int = 128

    @property
    def name(self) -> str:
        """What is in the store."""
        words = ["captured step", str(self.dtype).removeprefix("torch."), f"{self.dim} channels"]
        words += [f"K{f.key_bits}V{f.value_bits}" for f in self.formats] + (["scored"] if self.scored else [])
        return ", ".join(words)

    def check(self, setting: Setting, kernels: Kernels) -> Figures:
        """Outputs of every token, and what is in the pages in the end."""
        tokens = 3 if setting.tiny else _TOKENS
        capture = cuda_graph if setting.device.type == "cuda" else _again
        outputs, left = [], []
        for one, how in ((kernels, capture), (reference, _again)):
            torch.manual_seed(0)
            found, content = self._play(setting, one, how, tokens)
            outputs.append(torch.stack(found))
            left.append(content)
        tolerance = CODED_OUTPUT[self.dtype]
        pairs = [Pair("outputs", *outputs, tolerance, tolerance)]
        for name, *each in zip(("lengths", "keys", "values", "columns"), *left, strict=False):
            pairs.append(Pair(name, *each))
        if self.scored:
            pairs.append(Pair("scores", left[0][4], left[1][4], 1e-3, 1e-2))
        return compare(pairs)

    def _play(
        self, setting: Setting, kernels: Kernels, capture: Callable[..., Callable[[], Tensor]], tokens: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        lengths, of_codes = (_TINY, _TINY_CODED) if setting.tiny else (_LENGTHS, _CODED)
        dim = 32 if setting.tiny else self.dim
        heads, like = (len(lengths), len(lengths[0])), (dim, dim, self.dtype)
        with torch.device(setting.device):
            store = filled(lengths, *like, scored=self.scored)
            coded = [coded_pages(of_codes, format, *like, scored=self.scored) for format in self.formats]
            queries = strided(tokens, *heads, 4, 1, dim, dtype=self.dtype)
            keys, values = (strided(tokens, *heads, 1, dim, dtype=self.dtype) for _ in range(2))
            columns = torch.full((1,), 2 * max(map(max, lengths)), dtype=torch.int32)
        store.pages.reserve(tokens)
        views = [replace(view, longest=view.capacity) for view in (store.view(), *(part.view() for part in coded))]
        query, key, value = (each[0].clone() for each in (queries, keys, values))

        def step() -> Tensor:
            request = DecodeRequest(query, views, key, value, None, LogitOptions(dim**-0.5), self.scored)
            decoded = kernels.ragged_decode(request)
            scores, increments = None, None
            if decoded.on_kept is not None and decoded.on_fresh is not None:
                increments, scores = decoded.on_kept[:, :, 0], decoded.on_fresh[:, :, 0]
            kernels.append(AppendRequest(views, key, value, columns, None, scores, increments))
            columns.add_(1)
            return decoded.output

        before = [store.lengths, columns, *(part.pools["scores"] for part in self._scored(store, coded))]
        saved = [tensor.clone() for tensor in before]
        # Whatever is compiled or loaded must be before anything is captured.
        step()
        replay = capture(step)
        for tensor, content in zip(before, saved, strict=True):
            tensor.copy_(content)
        outputs = []
        for number in range(tokens):
            for target, source in ((query, queries), (key, keys), (value, values)):
                target.copy_(source[number])
            outputs.append(replay().clone())
        store.pages.longest += tokens
        return outputs, content_of(store)

    def _scored(self, store, coded):
        return [store, *(part.pool for part in coded)] if self.scored else []


def _again(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return step


STEPS = (
    Captured(),
    Captured(formats=(RowFormat(8, 8), RowFormat(4, 4))),
    Captured(scored=True),
    Captured(formats=(RowFormat(8, 4),), scored=True),
    Captured(torch.float32, dim=64, scored=True),
    Captured(torch.float16, formats=(RowFormat(8, 8),), dim=64),
)


def captured_cases(setting: Setting, kernels: Kernels) -> list[Case]:
    """Steps over every kind of store."""
    return [Case(one.name, partial(one.check, setting, kernels)) for one in STEPS]
