"""Settings: the options of a cache, as all of its layers share them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from headwise.gate.gate import LayerGate
from headwise.kernels import Kernels
from headwise.policies.scored import Rotation
from headwise.quant.formats import Precision


@dataclass(frozen=True)
class Settings:
    """How a cache works, whatever its policy.

    Attributes:
        page_size: rows in a page.
        prompt_columns: columns of the prompt, where it arrives in several passes; None: the first pass is all.
        kernels: what reads and writes the pages.
        evict_every: new columns between two evictions; 1 applies the rules after every token.
        layers: of the model.
        rotation: its rotary embedding, for policies that look through it; None where it is not known.
        dtype: of exact rows; None for what the model computes in.
        gates: by layer, for policies whose scores are predicted.
        precision: how older rows are stored; None keeps all of them exact.
    """

    page_size: int
    prompt_columns: int | None
    kernels: Kernels
    evict_every: int
    layers: int = 1
    rotation: Rotation | None = None
    gates: Mapping[int, LayerGate] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    precision: Precision | None = None
