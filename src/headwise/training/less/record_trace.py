"""Record trace: a model, a policy and a passage -> what is evicted when; the cache in use decides it.

Full attention reads the prompt in use, too. So one pass over the prompt gives the cache and the keys and values.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from headwise.errors import UnsupportedModelError
from headwise.hosts.transformers.cache import HeadwiseCache
from headwise.hosts.transformers.decoder import decoder_of
from headwise.hosts.transformers.layer import HeadwiseLayer
from headwise.policies.base import Policy
from headwise.stages.config import LayerConfig
from headwise.stages.layer import LayerCache
from headwise.training.less.replay import predict
from headwise.training.less.trace import EvictionTrace
from headwise.types import Bool, Float, Int, LogitOptions, Tensor


class _PromptKeeper(LayerCache):
    """A layer that also holds on to its prompt, `past`."""

    past: tuple[Tensor, Tensor]

    def attend(
        self,
        query: Float[Tensor, "b h g q d"],
        keys: Float[Tensor, "b h q d"],
        values: Float[Tensor, "b h q e"],
        mask: Bool[Tensor, "b q t"] | None,
        options: LogitOptions,
    ) -> Float[Tensor, "b h g q e"]:
        """As without it."""
        if self.seen == 0:
            self.past = keys, values
        return super().attend(query, keys, values, mask, options)


class _PromptKeepingCache(HeadwiseCache):
    def make_layer(self, config: LayerConfig) -> LayerCache:
        return _PromptKeeper(config, self.token_log)


@torch.no_grad()
def record_trace(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: Policy, ids: Int[Tensor, "1 t"], prompt: int
) -> EvictionTrace:
    """Run a policy over a passage.

    Args:
        policy: with the state that it is going to have, because what some policies evict depends on what was read.
        ids: of the passage, of which the first `prompt` are read at once.

    Raises:
        UnsupportedModelError: when a layer holds anything but keys and values.
    """
    cache = _PromptKeepingCache(model, policy, tokenizer=tokenizer, prompt_tokens=prompt)
    cores = [layer.core for layer in cache.headwise_layers]
    decoder = decoder_of(model)
    decoder(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True)
    past = {index: _past(layer) for index, layer in enumerate(cache.layers)}
    every = cores[0].config.cache.evict_every
    parts = ids[:, prompt:].split(every, dim=1)
    gone = {core.index: ids.new_full((past[core.index][0].shape[1], ids.shape[1]), len(parts)) for core in cores}
    for stage, part in enumerate(parts):
        for core in cores:
            there, columns = _kept(core, ids.shape[1]), gone[core.index]
            there[:, prompt + stage * every :] = True
            columns.masked_fill_(~there & (columns == len(parts)), stage)
        decoder(input_ids=part, past_key_values=cache, use_cache=True)
    fed = ids[:, prompt:]
    trace = EvictionTrace(fed, prompt, every, past, gone, torch.empty(fed.shape[1], 0))
    return replace(trace, full=predict(model, trace.without_evictions(), {}))


def _past(layer: CacheLayerMixin) -> tuple[Tensor, Tensor]:
    if isinstance(layer, HeadwiseLayer):
        assert isinstance(layer.core, _PromptKeeper)
        return layer.core.past
    if not isinstance(layer, DynamicLayer):
        raise UnsupportedModelError(
            f"all layers cannot be trained together where the cache has a {type(layer).__name__}; train each alone"
        )
    assert layer.keys is not None and layer.values is not None
    return layer.keys, layer.values


def _kept(core: LayerCache, columns: int) -> Bool[Tensor, "h t"]:
    """Whether each head holds each column."""
    assert core.store is not None
    at = core.store.kept_columns()[0].long().where(core.store.occupied()[0], columns)
    found = torch.zeros(len(at), columns + 1, dtype=torch.bool, device=at.device)
    return found.scatter_(1, at, True)[:, :columns]
