"""Told positions: what a model is told of where tokens are -> how far that is from where they are counted to be.

Rules go by the number of a token among the real ones. Who turns keys and queries back must know where they were turned
to, and models that see put an image on axes of time, height and width: what follows it is nearer than its number says.
"""

from __future__ import annotations

import warnings

import torch

from headwise.errors import HeadwiseWarning, InputError
from headwise.types import Bool, Int, Tensor


class ToldPositions:
    """The positions of one pass until it is counted, and what they come to.

    Attributes:
        shift: of every sequence, what to add to the number of its next token to get its position; None as long as all
            were told to be where their numbers say.
    """

    def __init__(self) -> None:
        self.shift: Int[Tensor, " b"] | None = None
        self._told: tuple[Int[Tensor, "*axes b q"], str | None] | None = None

    def tell(self, positions: Int[Tensor, "*axes b q"] | None, needing: str | None) -> None:
        """Take the positions that the model is told of the tokens of the coming forward pass.

        Args:
            positions: one for each token, or one on each of several axes; None where the model counts by itself.
            needing: what takes a token to be where its number says, if anything does.
        """
        self._told = None if positions is None else (positions, needing)

    @property
    def waiting(self) -> bool:
        """Whether there are any to compare."""
        return self._told is not None

    def count(self, own: Int[Tensor, "b q"], real: Bool[Tensor, "b q"], *, first: bool) -> None:
        """Compare them with what the tokens count, once it is known which are real.

        Args:
            own: the number of each token.
            first: whether nothing came before.

        Raises:
            InputError: when something needs both to be the same, and they are not.
        """
        told, self._told = self._told, None
        if told is None or told[0].shape[-1] != own.shape[1]:
            return
        # Axes first, if there is but one; a row of positions may be for all sequences.
        positions = told[0].to(own.device).reshape(-1, *told[0].shape[-2:]).expand(-1, len(own), -1)
        apart = positions - own
        if self.shift is None and bool(((apart == 0) | ~real).all()):
            return
        if told[1] is not None:
            raise InputError(
                f"{told[1]} takes every token to be where its number in the prompt says, and the position_ids of this "
                "pass say otherwise, as for images on several axes or for several texts in one row; take a policy that "
                "does not look at positions, such as SnapKV"
            )
        before = torch.zeros_like(own[:, 0]) if self.shift is None else self.shift
        rows, last = torch.arange(len(own), device=own.device), own.shape[1] - 1
        begin = apart[:, rows, real.int().argmax(dim=1)]
        end = apart[:, rows, last - real.flip(1).int().argmax(dim=1)].amax(dim=0)
        # Within an image the axes differ; its first token and those of a text go on from what came before.
        off = (begin == begin[0]).all(0) & (begin[0] != before) & real.any(1)
        if not first and bool(off.any()):
            row = int(off.nonzero()[0])
            warnings.warn(
                f"the tokens of this pass stand {int(begin[0, row] - before[row]):+d} positions off from where "
                f"sequence {row} ended: either position_ids say so, or the model has read another prompt since, as it "
                "keeps what it knows of images by itself; then set model.model.rope_deltas = None, and pass "
                "image_grid_thw and mm_token_type_ids of the whole conversation",
                HeadwiseWarning,
                stacklevel=2,
            )
        self.shift = torch.where(real.any(1), end, before)

    def select(self, indices: Int[Tensor, " new"]) -> None:
        """Keep the sequences at `indices`, in that order."""
        if self.shift is not None:
            self.shift = self.shift[indices.to(self.shift.device)]
