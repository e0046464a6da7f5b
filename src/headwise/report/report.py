"""7/7 report: what the layers of a cache hold -> data and a table: bytes used, allocated and saved, rule per head."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from headwise.report.formats import Names
from headwise.report.html import report_html
from headwise.report.layer_report import LayerReport
from headwise.report.rows import share_of
from headwise.report.steered import Steered
from headwise.report.words import mended_words, remembered_words
from headwise.types import Tensor
from headwise.units import format_bytes


@dataclass(frozen=True)
class Report:
    """What a cache holds at one moment. Data first: `to_dict()` gives plain numbers, printing gives a table.

    Attributes:
        policy: the policy, as Python would build it.
        seen_tokens: columns the model was given, padding included.
        layers: one entry per layer of the cache.
        transcript_bytes: what the cache knows about tokens beside the rows.
        kernel: name of the kernels that read and write the pages.
        profile_seconds: time spent on choosing the rules, and on profiling the prompt but for what its attention gives.
        compact_seconds: time spent on copying the prompt's kept rows into pages.
        asked: what is to be kept, in words, where the policy has a size.
        steering: which heads are steered, and by what is marked where; None where nothing is.
    """

    policy: str
    seen_tokens: int
    layers: list[LayerReport]
    transcript_bytes: int
    kernel: str
    profile_seconds: float
    compact_seconds: float
    asked: str | None = None
    steering: Steered | None = None

    @property
    def pinned_bytes(self) -> int:
        """Of rows that are kept because a user marked them; a part of the bytes used."""
        return sum(layer.pinned_bytes for layer in self.layers)

    @property
    def used_bytes(self) -> int:
        """Bytes of the kept rows: keys, values, columns, scores and biases; and of what LESS remembers; all layers."""
        return sum(layer.used_bytes for layer in self.layers)

    @property
    def memory_bytes(self) -> int:
        """The part of the bytes used that LESS remembers evicted rows with."""
        return sum(layer.memory_bytes for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the kernels of LESS, 0 without; all caches share them, so no other number here counts them."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def remembered(self) -> dict[str, int]:
        """What LESS takes, by name; nothing without it."""
        sizes = {"memory_bytes": self.memory_bytes, "weight_bytes": self.weight_bytes}
        return sizes if self.weight_bytes else {}

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the storage behind every tensor of the cache, page slack and tables included."""
        return sum(layer.allocated_bytes for layer in self.layers) + self.transcript_bytes

    @property
    def full_bytes(self) -> int:
        """Bytes that transformers' own cache would hold for the same tokens."""
        return sum(layer.full_bytes for layer in self.layers)

    @property
    def saved_bytes(self) -> int:
        """What is held less than a full cache would; negative where the bookkeeping costs more than it frees."""
        return self.full_bytes - self.allocated_bytes

    @property
    def kept_tokens(self) -> list[Tensor | None]:
        """Stored rows per layer, `[batch, KV heads]`; None for a layer that is not headwise's."""
        return [layer.kept_tokens for layer in self.layers]

    @property
    def kept_media(self) -> list[Tensor | None]:
        """How many of them stand for images, videos and sounds; None also where the policy does not look at that."""
        return [layer.kept_media for layer in self.layers]

    @property
    def rules(self) -> list[Names | None]:
        """Rule names per layer, arrays of the same shape; None for a layer that is not headwise's."""
        return [layer.rules for layer in self.layers]

    @property
    def kept_ratio(self) -> float:
        """Kept rows over the rows of a full cache, in the compressed layers; 1 where there is none."""
        kept = [layer.kept_tokens for layer in self.layers if layer.kept_tokens is not None]
        rows = sum(tensor.numel() for tensor in kept) * self.seen_tokens
        return sum(int(tensor.sum()) for tensor in kept) / rows if rows else 1.0

    @property
    def rule_counts(self) -> dict[str, int]:
        """How many heads, over all layers and sequences, took each rule; in the order of the ladder."""
        counts = Counter(name for rules in self.rules if rules is not None for name in rules.flatten().tolist())
        order = [rung for layer in self.layers for rung in layer.rungs]
        return {name: counts[name] for name in dict.fromkeys(order) if counts[name]}

    @property
    def formats(self) -> list[Names | None]:
        """How each head's older rows are stored, per layer; None where all are exact."""
        return [layer.formats for layer in self.layers]

    @property
    def rows_by_format(self) -> dict[str, int]:
        """Rows of all layers, heads and sequences by how they are stored; nothing where all are exact."""
        found: Counter[str] = Counter()
        for layer in self.layers:
            found.update(layer.rows_by_format or {})
        return {name: rows for name, rows in found.items() if rows}

    @property
    def format_counts(self) -> dict[str, int]:
        """How many heads, over all layers and sequences, have each format; nothing where all rows are exact."""
        return dict(Counter(name for names in self.formats if names is not None for name in names.flatten().tolist()))

    @property
    def matched(self) -> list[Tensor | None]:
        """Error of the outputs before and after rows were refitted, per layer, `[2, batch, KV heads]`, or None."""
        return [layer.matched for layer in self.layers]

    @property
    def sampled(self) -> float | None:
        """Share of the prompt's query rows that the profile read; None where there was no profile."""
        return next((layer.sampled for layer in self.layers if layer.sampled is not None), None)

    @property
    def found_recovery(self) -> list[float] | None:
        """Attention mass that the budget let every head of a sequence retain; None where no budget was given."""
        return next((layer.found.tolist() for layer in self.layers if layer.found is not None), None)

    @property
    def mean_error(self) -> list[float]:
        """The same on average over all heads, before and after; nothing where none were refitted."""
        heads = [errors.flatten(1) for errors in self.matched if errors is not None]
        mean: list[float] = torch.cat(heads, dim=1).mean(dim=1).tolist() if heads else []
        return mean

    @property
    def any_media(self) -> bool:
        """Whether anything that is kept stands for an image, a video or a sound."""
        return any(kept is not None and bool(kept.any()) for kept in self.kept_media)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python numbers, strings and lists, ready for JSON."""
        return {
            "policy": self.policy,
            "asked": self.asked,
            "seen_tokens": self.seen_tokens,
            "used_bytes": self.used_bytes,
            "allocated_bytes": self.allocated_bytes,
            "full_bytes": self.full_bytes,
            "saved_bytes": self.saved_bytes,
            **self.remembered,
            "kept_ratio": self.kept_ratio,
            "kernel": self.kernel,
            "profile_seconds": self.profile_seconds,
            "compact_seconds": self.compact_seconds,
            "profiled_rows": self.sampled,
            "found_recovery": self.found_recovery,
            "rule_counts": self.rule_counts,
            **({"format_counts": self.format_counts} if self.format_counts else {}),
            **({"rows_by_format": self.rows_by_format} if self.format_counts else {}),
            "kept_tokens": [None if kept is None else kept.tolist() for kept in self.kept_tokens],
            "rules": [None if rules is None else rules.tolist() for rules in self.rules],
            **({"kept_media": [None if m is None else m.tolist() for m in self.kept_media]} if self.any_media else {}),
            **({"matched": [None if m is None else m.tolist() for m in self.matched]} if self.mean_error else {}),
            **({"steering": self.steering.to_dict(), "pinned_bytes": self.pinned_bytes} if self.steering else {}),
            **({"formats": [None if f is None else f.tolist() for f in self.formats]} if self.format_counts else {}),
        }

    def lines(self) -> list[tuple[str, str]]:
        """What there is to be said, as names and words, in order; printing it shows these."""
        saved = f"{self.saved_bytes / self.full_bytes:.1%}" if self.full_bytes else "-"
        lines = [
            ("policy", self.policy),
            *([("asked for", self.asked)] if self.asked else []),
            ("tokens seen", f"{self.seen_tokens:,}"),
            ("tokens kept", f"{self.kept_ratio:.1%} of all rows"),
            *([("of them media", share_of(self.kept_media, self.kept_tokens))] if self.any_media else []),
            ("memory used", format_bytes(self.used_bytes)),
            *([("of it marked", format_bytes(self.pinned_bytes))] if self.steering else []),
            ("memory held", format_bytes(self.allocated_bytes)),
            *([("remembered", remembered_words(self.memory_bytes, self.weight_bytes))] if self.remembered else []),
            ("full cache", format_bytes(self.full_bytes)),
            ("saved", f"{format_bytes(self.saved_bytes)} ({saved})"),
        ]
        if self.sampled is not None:
            exact = "every query row" if self.sampled >= 1 else f"a sample of {self.sampled:.1%} of the query rows"
            lines.append(("profile", f"{exact}, {self.profile_seconds:.2f} s"))
        if self.found_recovery is not None:
            lines.append(("recovery found", ", ".join(f"{share:.3f}" for share in self.found_recovery)))
        if self.mean_error:
            lines.append(("outputs off by", mended_words(*self.mean_error)))
        if self.steering is not None:
            lines.append(("steered", self.steering.words))
        lines.append(("kernels", self.kernel))
        total = sum(self.rule_counts.values())
        lines += [(f"  {name}", f"{count} of {total} heads") for name, count in self.rule_counts.items()]
        rows = sum(self.rows_by_format.values())
        lines += [(f"  {name}", f"{count:,} of {rows:,} rows") for name, count in self.rows_by_format.items()]
        return lines

    def __str__(self) -> str:
        lines = self.lines()
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        return report_html(self.lines(), self.allocated_bytes / self.full_bytes if self.full_bytes else 0.0)
