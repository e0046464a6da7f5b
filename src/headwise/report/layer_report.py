"""Layer report: a layer of a cache -> its bytes and, where it is compressed, what each head keeps and why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headwise.report.formats import Names, format_names, rows_by_format
from headwise.report.rows import kept_media, pinned_bytes
from headwise.stages.layer import LayerCache
from headwise.types import Tensor
from headwise.units import storage_bytes

_UNCHOSEN = "undecided"


@dataclass(frozen=True)
class LayerReport:
    """One layer: its bytes and, where headwise compresses it, what each head keeps and why.

    Attributes:
        kept_tokens: stored rows, `[batch, KV heads]`; None for a layer that is not headwise's.
        rules: name of the rule of each head, an array of the same shape; None likewise.
        recovered: mass that every rung retains, `[rungs, batch, KV heads]`; None where nothing was chosen.
        sampled: share of the prompt's query rows that the profile read; None where there was no profile.
        found: share of the mass that the budget let every head retain, `[batch]`; None where no budget was given.
        memory_bytes: what LESS holds of evicted rows; a part of the bytes used.
        weight_bytes: the kernels of LESS, which all caches share and none of the other numbers counts.
        formats: of each head's older rows, such as "K8V4" or "K8V8+K4V4", an array of the same shape; None where all
            rows are exact.
        rows_by_format: rows of all its heads by how they are stored; None or nothing where all are exact.
        kept_media: of the kept tokens, those that stand for images, videos and sounds, of the same shape; None where
            the policy does not look at what tokens are.
        matched: error of each head's outputs for reference queries before and after rows were refitted, as a share of
            their size, `[2, batch, KV heads]`; None where they were not.
        pinned_bytes: of rows that are kept because a user marked them; a part of the bytes used.
    """

    used_bytes: int
    allocated_bytes: int
    full_bytes: int
    kept_tokens: Tensor | None = None
    rules: Names | None = None
    rungs: tuple[str, ...] = ()
    recovered: Tensor | None = None
    sampled: float | None = None
    found: Tensor | None = None
    memory_bytes: int = 0
    weight_bytes: int = 0
    formats: Names | None = None
    rows_by_format: dict[str, int] | None = None
    kept_media: Tensor | None = None
    matched: Tensor | None = None
    pinned_bytes: int = 0

    @classmethod
    def of_stock(cls, tensors: list[Tensor]) -> LayerReport:
        """A layer that stays as transformers made it: the same with headwise and without."""
        size = storage_bytes(tensors)
        return cls(sum(tensor.nbytes for tensor in tensors), size, size)

    @classmethod
    def of(cls, layer: LayerCache) -> LayerReport:
        """A compressed layer."""
        kept, features = layer.kept_tokens, layer.evicted.features
        weight_bytes = 0 if features is None else features.nbytes
        if kept is None:
            return cls(0, 0, 0, weight_bytes=weight_bytes)
        plan = layer.plan
        labels = (_UNCHOSEN,) if plan is None else tuple(rung.label for rung in plan.rungs)
        choice = np.zeros(tuple(kept.shape), dtype=int) if plan is None else plan.choice.cpu().numpy()
        selection = layer.config.policy.selection
        budgeted = plan is not None and selection is not None and selection.keep is not None
        rows_read = layer.prompt.observations.mass.rows_read
        profiled = plan is not None and rows_read and plan.prompt.numel()
        return cls(
            used_bytes=layer.used_bytes,
            allocated_bytes=storage_bytes(layer.tensors()),
            full_bytes=kept.numel() * layer.seen * layer.full_row_bytes,
            kept_tokens=kept.cpu(),
            rules=np.array(labels)[choice],
            rungs=labels,
            recovered=None if plan is None or plan.recovered is None else plan.recovered.cpu(),
            sampled=min(1.0, rows_read / max(1, int(plan.prompt.max()))) if plan and profiled else None,
            found=plan.threshold.clamp(max=1).cpu() if plan and budgeted and plan.threshold is not None else None,
            memory_bytes=layer.evicted_bytes,
            weight_bytes=weight_bytes,
            formats=None if layer.store is None else format_names(layer.store),
            rows_by_format={} if layer.store is None else rows_by_format(layer.store),
            kept_media=kept_media(layer),
            pinned_bytes=pinned_bytes(layer),
            matched=None if plan is None or plan.matched is None else plan.matched.cpu(),
        )
