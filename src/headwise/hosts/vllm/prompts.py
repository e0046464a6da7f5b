"""Prompts: requests that are compressed -> what their layers asked so far, and where their rows lie afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from headwise.hosts.vllm.choice import Asked, PromptBlocks, query_rows
from headwise.hosts.vllm.micro_pages import MicroPages
from headwise.hosts.vllm.options import Options
from headwise.policies.choice import PromptSummary
from headwise.stages.mass_profile import MassProfile
from headwise.types import Float, Int, Tensor, UInt8


@dataclass
class Prompt:
    """A request in one group of layers.

    Attributes:
        seen: tokens of the prompt whose queries were looked at.
        seconds: spent on choosing.
        step: in which it last was in a batch.
        kinds: of its tokens, where the policy looks at them.
        ids: of its tokens.
        asked: of each layer, what the policy looks at.
        pages: of each layer and head those that hold what stays, padded with 0; zeros before anything was chosen.
        counts: how many there are.
        summaries, held: of the layers that share what stays, as far as they have read the prompt: what is known of
            them, and their caches.
        before: rows of every layer and head that were chosen of this prompt before; None where none were.
    """

    options: Options
    blocks: PromptBlocks
    layers: int
    heads: int
    kinds: UInt8[Tensor, "1 t"] | None = None
    seen: int = 0
    seconds: float = 0.0
    step: int = 0
    asked: dict[int, Asked] = field(default_factory=dict)
    summaries: dict[int, PromptSummary] = field(default_factory=dict)
    held: dict[int, MicroPages] = field(default_factory=dict)
    before: list[list[Tensor]] | None = None
    ids: Sequence[int] = ()
    pages: Int[Tensor, "layers h most"] = field(init=False)
    counts: Int[Tensor, "layers h"] = field(init=False)

    def __post_init__(self) -> None:
        self.pages = torch.zeros(self.layers, self.heads, 0, dtype=torch.int32, device="cpu")
        self.counts = torch.zeros(self.layers, self.heads, dtype=torch.int32, device="cpu")

    def forget(self) -> None:
        """Let go of what a prompt needs until it was read."""
        self.ids, self.kinds, self.before = (), None, None

    def observe(self, layer: int, queries: Float[Tensor, "1 h g q d"], mass: MassProfile | None) -> Asked:
        """Take in the queries of a pass, and the attention they pay; gives what the policy looks at, so far."""
        asked, rows = self.asked.setdefault(layer, Asked()), query_rows(self.options)
        held = queries if asked.queries is None else torch.cat([asked.queries, queries], dim=3)
        if rows is not None:
            held = held[:, :, :, max(0, held.shape[3] - rows) :]
        # A view of a pass would hold on to all of it.
        asked.queries = held.clone()
        asked.mass = mass if asked.mass is None or mass is None else asked.mass + mass
        return asked

    def place(self, layer: int, first: Int[Tensor, " stay"], rows: Sequence[Int[Tensor, " rows"]]) -> list[Tensor]:
        """Where the chosen rows of every head go in one layer: pages of the blocks that stay.

        Args:
            first: ids of these blocks.
            rows: of each head, a whole number of pages.
        """
        return self._set(layer, list(self._numbers(first).split([len(own) // self.blocks.size for own in rows])))

    def place_all(
        self, first: Int[Tensor, " stay"], rows: Sequence[Sequence[Int[Tensor, " rows"]]], places: Sequence[int]
    ) -> list[list[Tensor]]:
        """The same for all layers, which take one another's pages.

        Args:
            places: where each layer's pages begin among those of all.

        Returns:
            pages of each head of each layer; numbers are as though they were the layer's own.
        """
        free = torch.cat([self._numbers(first) + place for place in places])
        counts = [[len(own) // self.blocks.size for own in heads] for heads in rows]
        layers = free.split([sum(own) for own in counts])
        return [self._set(layer, list((own - places[layer]).split(counts[layer]))) for layer, own in enumerate(layers)]

    def _numbers(self, first: Int[Tensor, " stay"]) -> Int[Tensor, " pages"]:
        """Of all pages of some blocks in one layer."""
        return (first.long()[:, None] * self.heads + torch.arange(self.heads, device="cpu")).flatten().int()

    def _set(self, layer: int, pages: list[Tensor]) -> list[Tensor]:
        counts = [len(own) for own in pages]
        if max(counts) > self.pages.shape[2]:
            wider = torch.zeros(self.layers, self.heads, max(counts), dtype=torch.int32, device="cpu")
            wider[:, :, : self.pages.shape[2]] = self.pages
            self.pages = wider
        for head, own in enumerate(pages):
            self.pages[layer, head, : len(own)] = own
        self.counts[layer] = torch.tensor(counts, dtype=torch.int32, device="cpu")
        self.asked.pop(layer, None)
        return pages


def tables(
    prompts: Sequence[Prompt], blocks: Sequence[Int[Tensor, " n"]]
) -> tuple[Int[Tensor, "layers sequences width"], Int[Tensor, "layers sequences"]]:
    """Pages of every head of every request in order, and how many rows those hold that were chosen.

    Args:
        blocks: ids of all blocks of each request; those behind the whole ones of its prompt hold what came later.
    """
    layers, heads = prompts[0].counts.shape
    later = [own[prompt.blocks.whole :] for prompt, own in zip(prompts, blocks, strict=True)]
    width = max(p.pages.shape[2] + len(own) for p, own in zip(prompts, later, strict=True))
    table = torch.zeros(layers, len(prompts), heads, width, dtype=torch.int32, device="cpu")
    for at, (prompt, own) in enumerate(zip(prompts, later, strict=True)):
        table[:, at, :, : prompt.pages.shape[2]] = prompt.pages
        pages = own.int()[None, :] * heads + torch.arange(heads, dtype=torch.int32, device="cpu")[:, None]
        behind = prompt.counts[:, :, None].long() + torch.arange(len(own), device="cpu")
        table[:, at].scatter_(2, behind, pages.expand(layers, -1, -1))
    rows = torch.stack([prompt.counts * prompt.blocks.size for prompt in prompts], dim=1)
    return table.flatten(1, 2), rows.flatten(1, 2)
