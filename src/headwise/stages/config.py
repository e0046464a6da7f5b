"""Config: how a cache works, whatever its policy -> the options that its layers share, and those of each layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headwise.errors import ConfigurationError
from headwise.gate.gate import LayerGate
from headwise.kernels.interface import DTYPES, Kernels
from headwise.less.features import LayerFeatures
from headwise.policies.base import Policy
from headwise.policies.checks import check_count
from headwise.policies.choice import Again
from headwise.policies.match import Match
from headwise.quant.formats import Precision
from headwise.steer.steering import LayerSteering
from headwise.types import Rotation


@dataclass(frozen=True)
class CacheConfig:
    """What all layers of a cache have in common.

    Attributes:
        kernels: what reads and writes the pages.
        page_size: rows in a page.
        prompt_columns: columns of the prompt, where it arrives in several passes; None: the first pass is all.
        evict_every: new columns between two evictions; 1 applies the rules after every token.
        layers: of the model.
        dtype: of exact rows; None for what the model computes in.
        precision: how older rows are stored; None keeps all of them exact.
        matching: how the values of kept rows are refitted; None leaves them as they are.

    Raises:
        ConfigurationError: when a count or the dtype is out of range.
    """

    kernels: Kernels
    page_size: int = 16
    prompt_columns: int | None = None
    evict_every: int = 16
    layers: int = 1
    dtype: torch.dtype | None = None
    precision: Precision | None = None
    matching: Match | None = None

    @property
    def biased(self) -> bool:
        """Whether rows may get a bias."""
        return self.matching is not None and self.matching.bias

    def __post_init__(self) -> None:
        check_count("page_size", self.page_size, 1)
        check_count("evict_every", self.evict_every, 1)
        if self.dtype not in (None, *DTYPES):
            raise ConfigurationError(f"cache_dtype must be one of {', '.join(map(str, DTYPES))}, got {self.dtype!r}")


@dataclass(frozen=True)
class LayerConfig:
    """What one compressed layer does.

    Attributes:
        index: of the layer, among all layers of the model.
        policy: what each head may keep: one that chooses, not a wrapper.
        rotation: the layer's rotary embedding, for policies that look through it; None where it is not known.
        gate: of the layer, where scores are predicted.
        features: of LESS, where what is evicted is remembered.
        readers: layers of the model that read what this one keeps, itself included.
        steering: of the layer; None where none of its heads is steered.
    """

    index: int
    policy: Policy
    cache: CacheConfig
    rotation: Rotation | None = None
    gate: LayerGate | None = None
    features: LayerFeatures | None = None
    readers: int = 1
    steering: LayerSteering | None = None

    @property
    def again(self) -> Again | None:
        """How the policy chooses when more tokens have come; None where it does not."""
        return self.policy.again

    @property
    def remembers(self) -> bool:
        """Whether rows carry what they were worth."""
        return self.again is not None and self.again.remembers

    @property
    def asks_queries(self) -> bool:
        """Whether what is kept depends on what queries look at."""
        return self.policy.asks_queries or self.cache.matching is not None
