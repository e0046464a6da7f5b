"""Token log: the columns given to the model -> which are real, where and what they are, the facts that rules look at.

One log serves all layers of a cache. It costs a few bytes per column, whatever the number of layers.
"""

from __future__ import annotations

import torch

from headwise.errors import InputError
from headwise.policies.tokens import Tokens
from headwise.stages.marks import ColumnMarks
from headwise.stages.told_positions import ToldPositions
from headwise.steer.steering import BaseSteering
from headwise.types import Bool, Float, Int, Tensor, UInt8


class TokenLog:
    """What every column of every sequence is.

    Args:
        needs_kinds: whether the policy looks at the kind of a token.
        steering: by which marks are made of what a user marks; None where nothing is ever marked.
    """

    def __init__(self, needs_kinds: bool, steering: BaseSteering | None = None) -> None:
        self.needs_kinds, self.marks = needs_kinds, ColumnMarks(steering)
        self.columns = 0
        self._announced: UInt8[Tensor, "b q"] | None = None
        self._kinds: UInt8[Tensor, "b t"] | None = None
        # Both stay None until the first padding column: without padding a position is its column.
        self._real: Bool[Tensor, "b t"] | None = None
        self._positions: Int[Tensor, "b t"] | None = None
        self.told = ToldPositions()

    def announce(self, kinds: UInt8[Tensor, "b q"] | None) -> None:
        """Take the kinds of the tokens that the coming forward pass will process."""
        self._announced = kinds

    def extend(self, batch: int, count: int, real: Bool[Tensor, "b q"] | None, device: torch.device) -> None:
        """Add `count` columns; `real` is None where none of them is padding.

        Raises:
            InputError: when the policy needs kinds and the model was called without `input_ids`, or needs positions
                and the model was told others than are counted.
        """
        if self.needs_kinds:
            kinds = self._announced
            if kinds is None or kinds.shape != (batch, count):
                raise InputError(
                    "the policy looks at the kind of each token, but the model was called without matching input_ids; "
                    "pass input_ids, not inputs_embeds, to the model the cache was made for"
                )
            self._kinds = kinds if self._kinds is None else torch.cat([self._kinds, kinds], dim=1)
            self._announced = None
        if real is not None and self._real is None and not bool(real.all()):
            self._real = torch.ones(batch, self.columns, dtype=torch.bool, device=device)
        if self._real is not None:
            new = torch.ones(batch, count, dtype=torch.bool, device=device) if real is None else real.to(device)
            self._set_real(torch.cat([self._real, new], dim=1))
        self.columns += count
        if self.told.waiting or self.marks.announced:
            columns = torch.arange(self.columns - count, self.columns, device=device).expand(batch, 1, -1)
            positions, counted = self.positions(columns)[:, 0], self.real(columns)[:, 0]
            if self.told.waiting:
                self.told.count(positions, counted, first=self.columns == count)
            self.marks.extend(positions, counted, self.columns)

    def mark(self, marked: Bool[Tensor, "b recent"], kind: int) -> None:
        """Add bits to the kinds of the newest tokens: those just announced, and older ones if there are more."""
        assert self._announced is not None
        bits = marked.to(torch.uint8) * kind
        count = self._announced.shape[1]
        self._announced = self._announced | bits[:, -count:]
        older = bits.shape[1] - count
        if older and self._kinds is not None:
            self._kinds[:, -older:] |= bits[:, :older]

    def correct(self, newest: UInt8[Tensor, "b recent"]) -> None:
        """Replace the kinds of the newest columns."""
        if self._kinds is not None:
            self._kinds[:, -newest.shape[1] :] = newest

    def truncate(self, columns: int) -> None:
        """Forget everything from that column on."""
        self.columns = columns
        if columns == 0:
            # The next prompt may have another number of sequences.
            self._kinds = self._real = self._positions = self._announced = None
            self.told = ToldPositions()
        self.marks.truncate(columns)
        if self._kinds is not None:
            self._kinds = self._kinds[:, :columns].clone()
        if self._real is not None:
            self._keep_real(self._real[:, :columns].clone())

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep the sequences at `indices`, in that order; one may be taken several times."""
        self.told.select(indices)
        self.marks.select(indices)
        if self._kinds is not None:
            self._kinds = self._kinds[indices.to(self._kinds.device)]
        if self._real is not None:
            self._keep_real(self._real[indices.to(self._real.device)])

    def positions(self, columns: Int[Tensor, "b h n"]) -> Int[Tensor, "b h n"]:
        """Position of each column among the real tokens; of a padding column, that of the real token before it."""
        return columns.long() if self._positions is None else _look_up(self._positions, columns).long()

    def kinds(self, columns: Int[Tensor, "b h n"]) -> UInt8[Tensor, "b h n"] | None:
        """Kind of the token in each column; None where the policy does not ask for it."""
        return None if self._kinds is None else _look_up(self._kinds, columns)

    def real(self, columns: Int[Tensor, "b h n"]) -> Bool[Tensor, "b h n"]:
        """Whether each column holds a real token."""
        if self._real is None:
            return torch.ones_like(columns, dtype=torch.bool)
        return _look_up(self._real, columns)

    def all_real(self) -> Bool[Tensor, "b t"] | None:
        """Whether each column holds a real token; None where no column is padding."""
        return self._real

    def real_at(self, columns: Int[Tensor, " n"]) -> Bool[Tensor, "b n"] | None:
        """Whether those columns of every sequence hold real tokens; None where no column is padding."""
        return None if self._real is None else self._real[:, columns.long()]

    def real_tokens(self, batch: int, columns: int, device: torch.device) -> Int[Tensor, " b"]:
        """Real tokens of each sequence in its first `columns` columns."""
        if self._real is None:
            return torch.full((batch,), columns, dtype=torch.long, device=device)
        return self._real[:, :columns].sum(dim=1)

    def facts(
        self,
        columns: Int[Tensor, "b h n"],
        valid: Bool[Tensor, "b h n"],
        scores: Float[Tensor, "b h n"] | None,
        seen_columns: int,
        prompt: Int[Tensor, " b"] | None,
        layer: int,
        layers: int,
    ) -> Tokens:
        """The facts about the tokens in those columns, seen from the newest of `seen_columns`.

        Args:
            valid: False where `columns` and `scores` are undefined.
            prompt: real tokens of the prompt; None at its end, when it is all that was seen.
            layer, layers: index of the layer, and how many there are.
        """
        columns = columns.long().masked_fill(~valid, 0)
        seen = self.real_tokens(len(columns), seen_columns, columns.device)
        position = self.positions(columns)
        valid = valid & self.real(columns)
        return Tokens(
            position=position,
            age=seen[:, None, None] - 1 - position,
            valid=valid,
            pool=valid,
            prompt=(seen if prompt is None else prompt)[:, None, None],
            seen=seen[:, None, None],
            kind=self.kinds(columns),
            score=None if scores is None else scores.masked_fill(~valid, 0),
            layer=layer,
            layers=layers,
            pinned=self.marks.pinned_at(columns),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything it holds, by name."""
        held = {"kinds": self._kinds, "real": self._real, "positions": self._positions, "shift": self.told.shift}
        return {name: tensor for name, tensor in held.items() if tensor is not None} | self.marks.tensors()

    def restore(self, columns: int, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave, over that many columns."""
        self.columns = columns
        self._kinds = tensors.get("kinds")
        self._real = tensors.get("real")
        self._positions = tensors.get("positions")
        self.told.shift = tensors.get("shift")
        self.marks.restore(tensors)

    def _keep_real(self, real: Bool[Tensor, "b t"]) -> None:
        """What is left of the columns, after some went; the padding may have gone with them."""
        if bool(real.all()):
            self._real = self._positions = None
        else:
            self._set_real(real)

    def _set_real(self, real: Bool[Tensor, "b t"]) -> None:
        self._real = real
        self._positions = (real.cumsum(dim=1) - 1).clamp(min=0).to(torch.int32)


def _look_up(table: Tensor, columns: Int[Tensor, "b h n"]) -> Tensor:
    batch, heads, rows = columns.shape
    return table.gather(1, columns.reshape(batch, -1).long()).view(batch, heads, rows)
