"""Model source: a model's name and options -> the model under test, in whichever process needs it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from headwise.eval.task import Subject
from headwise.hosts.transformers.models import DEFAULT_MODEL, load_default_model, load_model
from headwise.kernels.backends import AUTO


@dataclass(frozen=True)
class ModelSource:
    """How to load what is measured. Holds names only, so that it can travel to another process.

    Args:
        model: Hub id or folder; None for the default model.
        dtype: such as "bfloat16"; None for what suits the device.
        device: such as "cuda:1"; None for the GPU where there is one.
        kernel, evict_every: of every cache, see `HeadwiseCache`.
        cache_dtype: such as "float16", of the rows; None for the model's.
    """

    model: str | None = None
    dtype: str | None = None
    device: str | None = None
    kernel: str = AUTO
    evict_every: int = 16
    cache_dtype: str | None = None

    @property
    def name(self) -> str:
        """Of the model, for records."""
        return self.model or os.environ.get("HEADWISE_MODEL") or DEFAULT_MODEL

    def load(self) -> Subject:
        """The model, its tokenizer, and the options of its caches.

        Raises:
            ModelNotFoundError: when it cannot be found or read.
        """
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        where = (dtype, self.device)
        loaded = load_default_model(*where) if self.model is None else load_model(self.model, *where)
        rows = None if self.cache_dtype is None else getattr(torch, self.cache_dtype)
        return Subject(*loaded, {"kernel": self.kernel, "evict_every": self.evict_every, "cache_dtype": rows})

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
