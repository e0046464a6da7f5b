"""Workload: a tokenizer or a vocabulary, a batch and a length -> token ids; text of Python's own manual, or random."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headwise.measure.texts import manual
from headwise.types import Int, Tensor

if TYPE_CHECKING:
    from headwise.bench.models import Tokenizer


def text_ids(tokenizer: Tokenizer, batch: int, length: int) -> Int[Tensor, "b t"]:
    """The manual, from another place in every sequence; it is about 170,000 tokens long and begins anew at its end."""
    stream = torch.tensor(tokenizer(manual(), add_special_tokens=False)["input_ids"])
    starts = torch.arange(batch)[:, None] * (len(stream) // batch)
    return stream[(starts + torch.arange(length)) % len(stream)]


def random_ids(vocabulary: int, batch: int, length: int, seed: int = 0) -> Int[Tensor, "b t"]:
    """Uniform ids, for weights that make no sense of text either; the same on every device."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
