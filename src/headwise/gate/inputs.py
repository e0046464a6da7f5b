"""Inputs: the keys of a prompt -> what a gate sees of each token, which is the same wherever in a text it stands."""

from __future__ import annotations

import torch

from headwise.types import Float, Int, Rotation, Tensor

# Numbers that say where a token stands.
PLACE = 4


def gate_inputs(
    keys: Float[Tensor, "b h t d"],
    positions: Int[Tensor, "b t"],
    length: Int[Tensor, "b 1 1"],
    rotation: Rotation | None,
) -> Float[Tensor, "b t c"]:
    """Keys of all heads, turned back to position 0, and behind them the token's place.

    Turned back, a key is linear in what the layer read. The place matters as much: the model repeats a prompt from a
    distance, and where there is little before a token, there is little that it could be mistaken for.

    Args:
        positions: of padding anything.
        length: real tokens of each sequence.
        rotation: of the model; None where it has none that is known, and nothing is turned.
    """
    turned = keys.float() if rotation is None else rotation(keys.float(), positions, True)
    count = length[:, :, 0].expand_as(positions).float()
    before = positions.float().clamp(min=0).minimum(count - 1)
    place = [(before + 1).log(), (count - before).log(), before / count, count.log()]
    return torch.cat([turned.transpose(1, 2).flatten(2), torch.stack(place, dim=-1)], dim=-1)
