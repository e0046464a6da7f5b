"""Probe: a model and texts -> its answers with other heads steered in every sequence, from any layer up.

What a layer gives does not depend on heads above it, nor what it gives of tokens before the first mark on any. So the
texts are read once, and then, for heads of one layer, the layers below give what they gave then, and only tokens from
the first mark on are computed, by the model's own forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from headwise.errors import UnsupportedModelError
from headwise.hosts.transformers.attention import register_interface, steered
from headwise.hosts.transformers.decoder import decoder_of
from headwise.hosts.transformers.switch import headwise_attention_on
from headwise.kernels.interface import AttentionMap, Marks
from headwise.types import Float, Int, Tensor


class Probe:
    """Some texts, read by a model.

    Args:
        model: on whose device the rest is.
        ids, mask: of the texts, padded on the left.
        before: columns before the first that is marked in any text, of which there must be one more.

    Raises:
        UnsupportedModelError: when the model's layers cannot be told from the rest of it.
    """

    def __init__(
        self, model: PreTrainedModel, ids: Int[Tensor, "n t"], mask: Int[Tensor, "n t"], before: int = 0
    ) -> None:
        register_interface()
        self._model, self._ids, self._mask, self._before = model, ids, mask, before
        self._layers = layers_of(model)
        self._outputs: list[Any] = []
        self._cache = DynamicCache(config=decoder_of(model).config)

    @torch.inference_mode()
    def read(self) -> Float[Tensor, "n vocabulary"]:
        """Read the texts, and return the logits of what follows each."""
        hooks: list[Any] = []
        if self._before:
            self._forward(slice(0, self._before))
        for layer in self._layers:
            hooks.append(layer.register_forward_hook(lambda _, given, output: self._outputs.append(output)))
        try:
            return self._rest()
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def answers(
        self, layer: int, gates: Float[Tensor, "n heads"], marks: Float[Tensor, "n t"]
    ) -> Float[Tensor, "n vocabulary"]:
        """The same with heads of one layer steered.

        Args:
            gates: of the query heads of that layer, in every sequence.
            marks: what is added to the logits of the columns, where the gate is 1.
        """

        def add(module: nn.Module, map: AttentionMap) -> AttentionMap:
            if getattr(module, "layer_idx", None) != layer:
                return map
            own = gates.unflatten(1, map.query.shape[1:3])[..., None].expand(map.query.shape[:4])
            return AttentionMap(map.query, map.keys, map.mask, map.options, marks=Marks(own, marks))

        token = steered.set(add)
        try:
            with self._below(layer):
                return self._rest()
        finally:
            steered.reset(token)

    def _rest(self) -> Float[Tensor, "n vocabulary"]:
        """From the first mark on, and the cache as it was before."""
        try:
            return self._forward(slice(self._before, self._ids.shape[1]))
        finally:
            for each in self._cache.layers:
                if each.is_initialized:
                    each.keys, each.values = each.keys[:, :, : self._before], each.values[:, :, : self._before]

    def _forward(self, columns: slice) -> Float[Tensor, "n vocabulary"]:
        with headwise_attention_on(decoder_of(self._model).config):
            positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, columns]
            # Without padding a mask says nothing, and attention is faster without.
            mask = None if bool(self._mask.all()) else self._mask[:, : columns.stop]
            given: dict[str, Any] = {"input_ids": self._ids[:, columns], "position_ids": positions}
            output = self._model(**given, attention_mask=mask, past_key_values=self._cache, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1].float()
        return logits

    @contextmanager
    def _below(self, layer: int) -> Iterator[None]:
        """While it lasts, the layers below give what they gave when the texts were read."""
        below = self._layers[:layer]
        try:
            for each, output in zip(below, self._outputs, strict=False):
                # Found before the method of the class.
                each.forward = _giving(output)
            yield
        finally:
            for each in below:
                vars(each).pop("forward", None)


def layers_of(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The layers of a model's decoder.

    Raises:
        UnsupportedModelError: when they cannot be told from the rest of it.
    """
    decoder = decoder_of(model)
    count = decoder.config.get_text_config(decoder=True).num_hidden_layers
    for each in decoder.modules():
        if isinstance(each, nn.ModuleList) and len(each) == count:
            return list(each)
    raise UnsupportedModelError(f"{type(decoder).__name__} has no list of its {count} layers, to steer one of them")


def _giving(output: Any) -> Any:
    def forward(*_: Any, **__: Any) -> Any:
        return output

    return forward
