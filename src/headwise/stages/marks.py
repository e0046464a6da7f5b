"""Marks: what a user marked in the tokens of a prompt -> what every column adds to logits, and which are pinned.

One object serves all layers of a cache; which heads obey, each layer says.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from headwise.errors import ConfigurationError, InputError
from headwise.steer.spans import Marked
from headwise.steer.steering import BaseSteering
from headwise.types import Bool, Float, Int, Tensor


class ColumnMarks:
    """Of the columns of prompts what each adds to logits; later columns add nothing.

    Args:
        steering: None where nothing is ever marked.

    Attributes:
        values: of the first m columns; None while nothing is marked.
        pinned: columns that are marked, which no policy evicts; beside `values`.
    """

    def __init__(self, steering: BaseSteering | None) -> None:
        self._steering = steering
        self.reset()

    def reset(self) -> None:
        """Forget everything, what was announced included."""
        self._marked: Marked | None = None
        self.values: Float[Tensor, "b m"] | None = None
        self.pinned: Bool[Tensor, "b m"] | None = None

    @property
    def steers(self) -> bool:
        """Whether anything may be marked."""
        return self._steering is not None

    @property
    def how(self) -> str | None:
        """The way of steering in words, but for its heads; None where nothing is ever marked."""
        return None if self._steering is None else str(self._steering)

    @property
    def announced(self) -> bool:
        """Whether something is marked in columns that may still come."""
        return self._marked is not None

    def announce(self, marked: Marked, seen: int) -> None:
        """Take note of what is marked in the tokens that come next, behind those seen.

        What is marked already may be named again.

        Raises:
            ConfigurationError: when nothing is steered by what is marked.
            InputError: when something is marked that was read before, or nothing comes.
        """
        if self._steering is None:
            raise ConfigurationError(
                "nothing draws attention to what is marked: make the cache with steering=Steering(heads)"
            )
        everything = [(b, *each) for b, ranges in enumerate(marked.spans) for each in ranges]
        early = next((start for b, start, stop in everything if self._missed(b, start, stop, seen)), None)
        if early is not None or marked.columns <= seen:
            what = f"the ids end at {marked.columns}" if early is None else f"token {early} is marked"
            raise InputError(
                f"{what}, and {seen} tokens were read before: mark spans before the pass that brings them, counted "
                "from the first token of the conversation"
            )
        self._marked = marked

    def coming(self, first: int, batch: int, count: int) -> Bool[Tensor, "b q"]:
        """Which of so many columns from that one on are marked by what was announced.

        Raises:
            InputError: when spans were given of another number of sequences.
        """
        new = torch.zeros(batch, count, dtype=torch.bool, device="cpu")
        for row, ranges in zip(new, self._spans(batch), strict=True):
            for start, stop in ranges:
                row[max(0, start - first) : max(0, stop - first)] = True
        return new

    def extend(self, positions: Int[Tensor, "b q"], real: Bool[Tensor, "b q"], columns: int) -> None:
        """Take in the newest of so many columns.

        Args:
            real: False for padding, which adds nothing.

        Raises:
            InputError: when spans were given of another number of sequences, or padding is marked.
        """
        batch, count = positions.shape
        first, marked = columns - count, self._marked
        if self._steering is None or marked is None:
            return
        if first >= marked.columns:
            self._marked = None
            return
        new = self.coming(first, batch, count).to(real.device)
        told = torch.arange(first, columns, device=real.device) < marked.columns
        if bool((new & ~real).any()):
            raise InputError("padding is marked; ranges of tokens are counted with the padding that a batch has")
        # Only in sequences that have a span somewhere.
        any_marked = torch.tensor([[bool(own)] for own in self._spans(batch)], dtype=torch.bool, device=real.device)
        others = real & ~new & told & any_marked & (positions >= self._steering.unscaled)
        self._append(self._steering.marks(new, others), new, first)

    def at(self, columns: Int[Tensor, "b h n"]) -> Float[Tensor, "b h n"] | None:
        """What rows of these columns add; None where nothing is marked."""
        return None if self.values is None else _look_up(self.values, columns)

    def pinned_at(self, columns: Int[Tensor, "b h n"]) -> Bool[Tensor, "b h n"] | None:
        """Whether rows of these columns are pinned; None where nothing is marked."""
        return None if self.pinned is None else _look_up(self.pinned, columns)

    def between(self, first: int, stop: int) -> Float[Tensor, "b f"] | None:
        """What these columns add; None where all add nothing."""
        if self.values is None or first >= self.values.shape[1]:
            return None
        return functional.pad(self.values[:, first:stop], (0, max(0, stop - self.values.shape[1])))

    def truncate(self, columns: int) -> None:
        """Forget everything from that column on; what was announced and is to be read again is still known."""
        if columns == 0 and self.values is not None:
            self.values = self.pinned = None
        if self.values is not None and self.pinned is not None and columns < self.values.shape[1]:
            self.values, self.pinned = self.values[:, :columns].clone(), self.pinned[:, :columns].clone()

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep the sequences at `indices`, in that order."""
        if self.values is not None and self.pinned is not None:
            at = indices.to(self.values.device)
            self.values, self.pinned = self.values[at], self.pinned[at]

    def tensors(self) -> dict[str, Tensor]:
        """Everything it holds, by name."""
        if self.values is None or self.pinned is None:
            return {}
        return {"marks": self.values, "pinned": self.pinned}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        self.values, self.pinned = tensors.get("marks"), tensors.get("pinned")

    def _spans(self, batch: int) -> list[tuple[tuple[int, int], ...]]:
        """Of each sequence of a pass what is marked; beams and several answers are copies beside one another."""
        spans = () if self._marked is None else self._marked.spans
        if batch % max(1, len(spans)):
            raise InputError(f"spans of {len(spans)} sequences were marked, and this pass brings {batch}")
        return [own for own in spans or ((),) for _ in range(batch // max(1, len(spans)))]

    def _missed(self, sequence: int, start: int, stop: int, seen: int) -> bool:
        """Whether some of these columns were read and not marked."""
        if start >= seen:
            return False
        if self.pinned is None or sequence >= len(self.pinned):
            return True
        stop = min(stop, seen)
        return stop > self.pinned.shape[1] or not bool(self.pinned[sequence, start:stop].all())

    def _append(self, values: Float[Tensor, "b q"], pinned: Bool[Tensor, "b q"], first: int) -> None:
        if self.values is None or self.pinned is None:
            self.values, self.pinned = values.new_zeros(len(values), 0), pinned.new_zeros(len(pinned), 0)
        # What was generated in between adds nothing.
        between = first - self.values.shape[1], 0
        self.values = torch.cat([self.values, functional.pad(values, between)], dim=1)
        self.pinned = torch.cat([self.pinned, functional.pad(pinned, between)], dim=1)


def _look_up(table: Tensor, columns: Int[Tensor, "b h n"]) -> Tensor:
    """Entries of a table `[b, m]`; 0 for later columns."""
    batch, heads, rows = columns.shape
    at = columns.reshape(batch, -1).long()
    found = table.gather(1, at.clamp(max=table.shape[1] - 1))
    return found.masked_fill(at >= table.shape[1], 0).view(batch, heads, rows)
