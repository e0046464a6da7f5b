"""Proof: a model, and how its caches are made -> nothing where one that keeps all gives what transformers' own gives.

A trial (`trial.py`) finds out what a model's attention does; this, that nothing else of the model minds: that it does
not, say, read keys out of its cache by itself, or attend by a function that somebody made for it. It is done once for a
model, over a few tokens in two passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from headwise.errors import UnsupportedModelError
from headwise.hosts.transformers.decoder import decoder_of
from headwise.hosts.transformers.rotary import steady_embeddings
from headwise.kernels.backends import REFERENCE
from headwise.placement import device_of
from headwise.policies import Full
from headwise.stages.ambient import undisturbed
from headwise.types import Float, Tensor

# What each decoder was found to do otherwise; None where nothing.
_FOUND: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()

_IDS = (1, 2, 3), (4,)

# Of the norm, in fp32 and in shorter types: rounding may send a token to other experts.
_TOLERANCE, _SHORT_TOLERANCE = 0.02, 0.3


def check_served(model: PreTrainedModel, make_cache: Callable[..., Any]) -> None:
    """Refuse a model whose output is another with a cache of headwise that keeps everything.

    Args:
        make_cache: makes one, of a model and a policy.

    Raises:
        UnsupportedModelError: with the difference, or with what the model raised.
    """
    decoder = decoder_of(model)
    if decoder.training:
        return
    if decoder not in _FOUND:
        # The cache that is made in between asks too.
        _FOUND[decoder] = None
        _FOUND[decoder] = _difference(model, make_cache)
    found = _FOUND[decoder]
    if found is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not work with a compressed cache: {found}; use transformers' own cache"
        )


def _difference(model: PreTrainedModel, make_cache: Callable[..., Any]) -> str | None:
    decoder, cache = decoder_of(model), make_cache(model, Full(), kernel=REFERENCE)
    if not cache.computes_attention:
        return None
    with undisturbed(), steady_embeddings(decoder):
        expected = _hidden(decoder, DynamicCache(config=decoder.config))
        try:
            found = _hidden(decoder, cache)
        except Exception as error:
            return f"over a few tokens it raises {type(error).__name__}: {error}"
    tolerance = _TOLERANCE if expected.dtype.itemsize > 2 else _SHORT_TOLERANCE
    off = float((found - expected).float().norm() / expected.float().norm())
    # Random weights may give numbers that are none; whoever gives them to both is not told apart.
    return f"over a few tokens its output is off by {off:.1g} of its size" if off > tolerance else None


def _hidden(decoder: Any, cache: Any) -> Float[Tensor, "b q hidden"]:
    """What comes out behind the last layer, over two passes."""
    device, parts = device_of(decoder.get_input_embeddings()), []
    for ids in _IDS:
        output = decoder(input_ids=torch.tensor([ids], device=device), past_key_values=cache, use_cache=True)
        parts.append(output[0])
    return torch.cat(parts, dim=1)
