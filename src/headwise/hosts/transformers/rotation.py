"""Rotation: a model -> a function that turns vectors to positions and back, as the model's own attention does."""

from __future__ import annotations

import inspect
import sys

from torch import nn
from transformers import PreTrainedModel

from headwise.policies.scored import Rotation
from headwise.types import Float, Int, Tensor


def find_rotation(model: PreTrainedModel) -> Rotation | None:
    """A model's rotary embedding, applied by its own function; None where it has none of the usual kind.

    Vectors come and go as fp32. A scaling that some embeddings carry (YaRN) is part of the turn to a position, and
    taken out again on the way back.
    """
    decoder = model.get_decoder()
    embedding = getattr(decoder, "rotary_emb", None)
    apply = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
    if not isinstance(embedding, nn.Module) or apply is None:
        return None
    wanted = list(inspect.signature(embedding.forward).parameters)
    if wanted != ["x", "position_ids"] or list(inspect.signature(apply).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return None

    def rotate(vectors: Float[Tensor, "b h n d"], positions: Int[Tensor, "b n"], back: bool) -> Tensor:
        cos, sin = embedding(vectors, positions)
        if back:
            # The square of the scaling: what a turn there and back multiplies a vector with.
            scaling = (cos[..., :1] ** 2 + sin[..., :1] ** 2)[:1, :1]
            cos, sin = cos / scaling, -sin / scaling
        turned: Tensor = apply(vectors, vectors, cos, sin)[0]
        return turned

    return rotate


__all__ = ["find_rotation"]
