"""Attention: what a model's attention module passes on -> the output, from a headwise layer or as `sdpa` gives it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from headwise.errors import CacheStateError, UnsupportedModelError
from headwise.hosts.transformers.compilation import leave_out_of_graphs
from headwise.kernels.attention import dense_attention
from headwise.kernels.interface import AttentionMap
from headwise.stages.ambient import autocast_dtype
from headwise.types import Bool, Float, LogitOptions, Tensor

NAME = "headwise"

# The layer that `update` was called on travels to the attention function on the key tensor.
LAYER_ATTRIBUTE = "headwise_layer"


@runtime_checkable
class PassObserver(Protocol):
    """What a cache is to the forward passes it is part of.

    Attributes:
        layers: of the model.
        broken: whether something was broken off half-way, so that it must be reset.
        newest: the last token of every sequence, where it is known.
        computes_attention: whether any layer is headwise's.
        asks_all_queries: whether layers that read the keys of others must be asked for every token.
    """

    layers: list[CacheLayerMixin]
    broken: bool
    newest: Tensor | None
    computes_attention: bool
    asks_all_queries: bool

    @property
    def awaits_attention(self) -> bool:
        """Whether a layer has new keys that no attention has been computed for."""
        ...

    def begin_pass(self, input_ids: Tensor | None) -> None:
        """Called before every forward pass that uses the cache."""
        ...

    def end_pass(self) -> None:
        """Called after every such pass that did not fail."""
        ...

    def reset(self) -> None:
        """Forget everything."""
        ...

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        ...


# The cache of the forward pass in progress: tells a lost attribute from a call that has no headwise cache.
active_cache: ContextVar[PassObserver | None] = ContextVar("headwise_active_cache", default=None)

# Told of every call, with query, key, value, mask and options, while a model is tried.
bystander: ContextVar[Callable[..., None] | None] = ContextVar("headwise_bystander", default=None)

# What is added to a map without a cache of ours, while heads are tried one by one.
steered: ContextVar[Callable[[nn.Module, AttentionMap], AttentionMap] | None] = ContextVar(
    "headwise_steered", default=None
)


def headwise_attention(
    module: nn.Module,
    query: Float[Tensor, "b heads q d"],
    key: Float[Tensor, "b h t d"],
    value: Float[Tensor, "b h t e"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b q heads e"], None]:
    """Attention function of the transformers interface, registered as "headwise".

    With a headwise layer: its compressed attention. With anything else: what `sdpa` computes, and the soft cap
    and sink logits that `sdpa` lacks.

    Raises:
        UnsupportedModelError: for a position bias, a mask per head or dropout on a compressed layer.
        CacheStateError: when the key lost its layer on the way.
    """
    layer = getattr(key, LAYER_ATTRIBUTE, None)
    heads = key.shape[1]
    grouped = query.unflatten(1, (heads, query.shape[1] // heads))
    sinks = kwargs.get("s_aux")
    options = LogitOptions(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        sinks=None if sinks is None else sinks.view(heads, -1),
    )
    if layer is not None:
        if kwargs.get("position_bias") is not None:
            raise UnsupportedModelError("a layer with a position bias cannot be compressed")
        if dropout:
            raise UnsupportedModelError("a compressed cache is for inference: call model.eval() first")
        given: tuple[Tensor, ...] = (grouped, key, value)
        # As torch's own attention under autocast, which queries, keys and values may reach in unequal types.
        wanted = autocast_dtype(key.device.type)
        if wanted is not None:
            given = tuple(tensor.to(wanted) for tensor in given)
        output = layer.attend(*given, _as_boolean(attention_mask, len(key)), options)
        # Layers that are trained over are differentiated; a compressed one has let go of what there is to follow.
        if torch.is_grad_enabled() and not output.requires_grad and any(tensor.requires_grad for tensor in given):
            output = _NoGradients.apply(output, *given)  # type: ignore[no-untyped-call]  # torch's
        return output.flatten(1, 2).transpose(1, 2).contiguous(), None

    watching = bystander.get()
    if watching is not None:
        watching(module, query, key, value, attention_mask, kwargs)
    cache = active_cache.get()
    if cache is not None and cache.awaits_attention:
        raise CacheStateError(
            f"{type(module).__name__} changed the keys between cache and attention; this model cannot be compressed"
        )
    steer = steered.get()
    if options.softcap is None and options.sinks is None and steer is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    mask = _as_boolean(attention_mask, len(key))
    if mask is None and not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        mask = torch.ones(len(key), query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
    map = AttentionMap(grouped, key, mask, options)
    output = dense_attention(map if steer is None else steer(module, map), value)
    return output.flatten(1, 2).transpose(1, 2).contiguous(), None


class _NoGradients(torch.autograd.Function):
    """The output as it is; whoever asks what it depends on is told that it cannot be had."""

    @staticmethod
    def forward(_: Any, output: Tensor, *given: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Any:
        raise CacheStateError(
            "gradients do not pass through a compressed cache, which is for inference: train with use_cache=False, or "
            "with transformers' own cache"
        )


def _as_boolean(mask: Tensor | None, batch: int) -> Bool[Tensor, "b q t"] | None:
    """A mask of the interface as one boolean matrix per sequence.

    Raises:
        UnsupportedModelError: for a mask that differs by head, or that adds anything but 0 and minus infinity.
    """
    if mask is None:
        return None
    if mask.shape[1] != 1:
        raise UnsupportedModelError("a mask that differs by head cannot be served")
    mask = mask[:, 0]
    if mask.dtype != torch.bool:
        seen = mask == 0
        # Masks that add use the lowest number or minus infinity for what is hidden.
        if bool((~seen & (mask > torch.finfo(mask.dtype).min / 2)).any()):
            raise UnsupportedModelError("a mask that adds a bias to the logits cannot be served")
        mask = seen
    return mask.expand(batch, -1, -1)


def register_interface() -> None:
    """Make "headwise" known to transformers: the attention function and the mask that goes with it."""
    AttentionInterface.register(NAME, headwise_attention)
    AttentionMaskInterface.register(NAME, _mask)
    leave_out_of_graphs()


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """As `sdpa` wants it; for a bystander all there is to see, as `eager` does."""
    made: Tensor | None = (sdpa_mask if bystander.get() is None else eager_mask)(*args, **kwargs)
    return made
