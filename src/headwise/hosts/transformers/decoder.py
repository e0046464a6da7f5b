"""Decoder: a model -> the part of it that reads ids with a cache and has the layers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> Any:
    """What the model calls its decoder; where that is some other part, such as the output's matrix, its base model."""
    decoder = model.get_decoder()
    return decoder if hasattr(decoder, "config") else model.base_model
