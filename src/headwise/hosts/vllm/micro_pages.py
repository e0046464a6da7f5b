"""Micro pages: vLLM's cache of a layer, however its kernels lay it out -> pages of one KV head each.

One block holds as many of them as there are heads; the page of a head in a block has the number `block * h + head`.
Those of other layers may be named too, where all lie in one piece of memory, by how far they are from a layer's own.
Nothing is copied to see a cache so, and vLLM's own kernel attends to them as if every head were a request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable

from headwise.types import Float, Int, Tensor


class MicroPages(ABC):
    """A layer's cache."""

    @property
    def place(self) -> int:
        """Where the layer's pages begin among those of the memory that they lie in."""
        return 0

    @property
    def memory(self) -> Hashable:
        """The same for layers that may take one another's pages; None where they may not."""
        return None

    @abstractmethod
    def read(self, blocks: Int[Tensor, " n"]) -> tuple[Float[Tensor, "h t d"], Float[Tensor, "h t d"]]:
        """Copies of the keys and values of every row in some blocks, in order."""

    @abstractmethod
    def write(self, pages: Int[Tensor, " n"], keys: Float[Tensor, "rows d"], values: Float[Tensor, "rows d"]) -> None:
        """Fill those pages, which belong to one head, from the first on."""

    @abstractmethod
    def attend(
        self,
        query: Float[Tensor, "rows g d"],
        table: Int[Tensor, "sequences width"],
        lengths: Int[Tensor, " sequences"],
        starts: Int[Tensor, " sequences_and_one"],
        sinks: Float[Tensor, " g"] | None,
    ) -> Float[Tensor, "rows g d"]:
        """Causal attention of the newest rows of sequences that have one KV head.

        Args:
            table: pages of each.
            lengths: rows that each has in them.
            starts: where the queries of each begin, and where the last end.
            sinks: learned logits of the query heads.
        """
