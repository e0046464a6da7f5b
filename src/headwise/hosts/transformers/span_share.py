"""Span share: a prompt, what is marked in it, and steering -> what every head gives the span, before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from headwise.hosts.transformers.attention import register_interface, steered
from headwise.hosts.transformers.decoder import decoder_of
from headwise.hosts.transformers.model_facts import read_facts
from headwise.hosts.transformers.switch import headwise_attention_on
from headwise.kernels.interface import AttentionMap
from headwise.stages.assemble import steered_layers
from headwise.stages.marks import ColumnMarks
from headwise.stages.steered import LayerMarks, marked_share
from headwise.steer.spans import Marked
from headwise.steer.steering import BaseSteering
from headwise.types import Float, Int, Tensor


@torch.inference_mode()
def span_shares(
    model: PreTrainedModel, ids: Int[Tensor, "1 t"], marked: Marked, steering: BaseSteering
) -> tuple[Float[Tensor, "layers heads"], Float[Tensor, "layers heads"], dict[int, list[int]]]:
    """Share of the attention of the last token that each query head gives to what is marked, without steering and with.

    Args:
        ids: of one sequence, without padding.

    Returns:
        both, NaN for layers without attention that transformers' interface computes, and which heads are steered.
    """
    register_interface()
    facts = read_facts(model)[0]
    columns, layers = ColumnMarks(steering), steered_layers(steering, facts)
    columns.announce(marked, 0)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    columns.extend(positions, torch.ones_like(positions, dtype=torch.bool), ids.shape[1])
    pinned = columns.pinned
    assert pinned is not None
    found = []
    for on in (False, True):
        shares: dict[int, Tensor] = {}

        def note(module: nn.Module, map: AttentionMap, on: bool = on, shares: Any = shares) -> AttentionMap:
            index: int | None = getattr(module, "layer_idx", None)
            if index is None:
                return map
            if on and index in layers:
                map = LayerMarks(layers[index], columns).attended(map)
            share = marked_share(map, pinned[:, : map.keys.shape[2]])
            shares[index] = share[0, :, :, -1].flatten().cpu()
            return map

        token = steered.set(note)
        try:
            with headwise_attention_on(decoder_of(model).config):
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
        finally:
            steered.reset(token)
        found.append(_side_by_side(shares, len(facts.layers)))
    heads = {index: each.gates.flatten().nonzero().flatten().tolist() for index, each in layers.items()}
    return found[0], found[1], heads


def _side_by_side(shares: dict[int, Tensor], layers: int) -> Float[Tensor, "layers heads"]:
    heads = max((len(each) for each in shares.values()), default=0)
    whole = torch.full((layers, heads), torch.nan, dtype=torch.float32, device="cpu")
    for index, each in shares.items():
        whole[index, : len(each)] = each
    return whole
