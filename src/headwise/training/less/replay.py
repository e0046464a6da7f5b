"""Replay: a trace and features -> what the model predicts with them, for all tokens at once and differentiable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import one_hot, pad
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from headwise.hosts.transformers.cache import HeadwiseCache
from headwise.hosts.transformers.layer import HeadwiseLayer
from headwise.kernels.attention import HIDDEN, logits_of, softmax
from headwise.less.features import LayerFeatures
from headwise.less.state import blend
from headwise.policies import Full
from headwise.stages.config import LayerConfig
from headwise.stages.layer import LayerCache
from headwise.training.less.trace import EvictionTrace
from headwise.types import Bool, Float, LogitOptions, Tensor


class ReplayLayer(LayerCache):
    """A layer that evicts when the trace says so, all of whose tokens after the prompt come at once.

    A token sees exactly what was not gone before it, and what was gone through the state.
    """

    def begin(self, trace: EvictionTrace, features: LayerFeatures | None) -> None:
        """Take in the prompt of a trace."""
        self.seen = trace.prompt
        self._features, self._stages = features, trace.stages
        self._past, self._gone = trace.past[self.index], trace.gone[self.index][None]
        early, late = self._gone[..., : self.seen], self._gone[..., self.seen :]
        # Where a head has fewer rows than others, what fills it up was gone from the start, so that nobody sees it.
        self._near = [_pick(past, early > 0) for past in self._past]
        self._near_gone = torch.cat([_pick(early[..., None], early > 0)[..., 0], late], dim=2)

    def attend(
        self,
        query: Float[Tensor, "1 h g q d"],
        keys: Float[Tensor, "1 h q d"],
        values: Float[Tensor, "1 h q e"],
        mask: Bool[Tensor, "1 q t"] | None,
        options: LogitOptions,
    ) -> Float[Tensor, "1 h g q e"]:
        """Attention over what is kept, and the state of what is not."""
        count = keys.shape[2]
        near_keys, near_values = _behind(self._near, keys, values)
        sees = self._near_gone[:, :, None] > self._stages[:, None]
        sees[..., -count:] &= torch.ones_like(sees[..., -count:]).tril()
        output, lse = _attention(query, near_keys, near_values, sees, options)
        if self._features is not None:
            output = blend(output, lse, *self._read(self._features, query, *_behind(self._past, keys, values)))
        return output.to(query.dtype)

    def _read(
        self,
        features: LayerFeatures,
        query: Float[Tensor, "1 h g q d"],
        keys: Float[Tensor, "1 h t d"],
        values: Float[Tensor, "1 h t e"],
    ) -> tuple[Float[Tensor, "1 h g q e"], Float[Tensor, "1 h g q"]]:
        """What the state answers, and with how much weight; every token asks the state of its stage."""
        stages = int(self._stages[-1]) + 1
        goes = one_hot(self._gone.clamp(max=stages), stages + 1)[..., :stages].float()
        # A column of ones behind the values sums up the weights themselves.
        values = pad(values.float(), (0, 1), value=1.0)
        changes = torch.einsum("bhts,bhtr,bhte->bhsre", goes, features.of_keys(keys), values)
        states = changes.cumsum(dim=2)[:, :, self._stages]
        read = torch.einsum("bhgqr,bhqre->bhgqe", features.of_queries(query), states)
        return read[..., :-1], read[..., -1]


class _ReplayCache(HeadwiseCache):
    def make_layer(self, config: LayerConfig) -> LayerCache:
        return ReplayLayer(config, self.token_log)


def predict(
    model: PreTrainedModel, trace: EvictionTrace, features: Mapping[int, LayerFeatures]
) -> Float[Tensor, "q vocabulary"]:
    """Log-probabilities after every token that follows the prompt.

    Args:
        features: by layer; a layer without any forgets.
    """
    cache = _ReplayCache(model, Full())
    for index, layer in enumerate(cache.layers):
        keys, values = trace.past[index]
        if isinstance(layer, HeadwiseLayer):
            assert isinstance(layer.core, ReplayLayer)
            layer.core.begin(trace, features.get(index))
            layer.lazy_initialization(keys, values)
        elif isinstance(layer, DynamicLayer):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = trace.prompt
    logits: Tensor = model(input_ids=trace.ids, past_key_values=cache, use_cache=True).logits[0]
    return logits.float().log_softmax(dim=-1)


def _behind(past: Sequence[Tensor], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)


def _attention(
    query: Float[Tensor, "b h g q d"],
    keys: Float[Tensor, "b h n d"],
    values: Float[Tensor, "b h n e"],
    sees: Bool[Tensor, "b h q n"],
    options: LogitOptions,
) -> tuple[Float[Tensor, "b h g q e"], Float[Tensor, "b h g q"]]:
    """Output and the logarithm of the softmax's denominator."""
    logits = logits_of(query, keys, options).masked_fill(~sees[:, :, None], HIDDEN)
    weights = softmax(logits, options)
    # Of the largest, weight and logit give the denominator without another exponential of every logit.
    at = logits.argmax(dim=-1, keepdim=True)
    lse = (logits.gather(-1, at) - weights.gather(-1, at).clamp(min=torch.finfo(torch.float32).tiny).log())[..., 0]
    return torch.einsum("bhgqn,bhne->bhgqe", weights, values.float()), lse


def _pick(rows: Tensor, named: Bool[Tensor, "b h n"]) -> Tensor:
    """The named rows of every head first, in their order, and as many others as the head with the most has more."""
    most = int(named.sum(dim=-1).max())
    order = (~named).to(torch.uint8).argsort(dim=-1, stable=True)[:, :, :most]
    return rows.gather(2, order[..., None].expand(*order.shape, rows.shape[-1]))
