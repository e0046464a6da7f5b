"""PyramidKV: SnapKV with more room in the lower layers and less in the upper ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwise.policies.checks import check_count
from headwise.policies.registry import register
from headwise.policies.size import quota_tokens, whole
from headwise.policies.snapkv import SnapKV
from headwise.policies.tokens import Tokens
from headwise.types import Int, Tensor


@register("pyramidkv")
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV whose budget falls linearly from the first layer to the last (Cai et al., 2024, section 4.2).

    arXiv 2406.02069. The last layer gets 1 / `steepness` of the mean budget and the first one as much more, as far as
    the prompt outside the window has it; the mean over the layers is `keep`. A budget with which the last layer would
    not have its window is spread evenly.

    Args:
        keep, window, kernel: as for SnapKV.
        steepness: beta of the paper.
    """

    steepness: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steepness", self.steepness, 1)

    def quota(self, tokens: Tokens) -> Int[Tensor, "b 1 1"]:
        """Of the layer."""
        mean = quota_tokens(self.keep, whole(tokens, self.of))
        most = (tokens.seen - self.window).double()
        last = mean.double() / self.steepness
        first = (2 * mean - last).minimum(most)
        last = 2 * mean - first
        # A single layer stands in the middle.
        share = tokens.layer / (tokens.layers - 1) if tokens.layers > 1 else 0.5
        sloped = (first + (last - first) * share).round().long()
        even = (last < self.window) | (last > first)
        return torch.where(even, mean, sloped)
