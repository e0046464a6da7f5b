"""Models: a setting -> small models with random weights whose attention has something to choose, and their prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from headwise.bench.models import random_model
from headwise.bench.workload import random_ids
from headwise.measure.model_info import SHAPES, Shape
from on_gpu.cases import Setting

# A Llama of many query heads over few KV heads, and the default model's shape.
SMALL = Shape(4, 512, 8, 2, 1024, 2048, 4096)
DEFAULT = SHAPES["smollm2-135m"]

# Random weights look at everything alike; keys and queries so many times larger look at some tokens only.
_SHARPER = 3.0


def sharp_model(shape: Shape, dtype: torch.dtype, setting: Setting) -> Any:
    """A Llama of that shape, or of next to nothing."""
    torch.manual_seed(0)
    small = replace(SHAPES["tiny"], vocabulary=shape.vocabulary // 16, heads=4, kv_heads=shape.kv_heads % 2 + 1)
    model = random_model(small if setting.tiny else shape, dtype, setting.device)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= _SHARPER
            layer.self_attn.k_proj.weight *= _SHARPER
    return model


def prompt(model: Any, batch: int, length: int) -> torch.Tensor:
    """Random ids, on the model's device."""
    return random_ids(model.config.vocab_size, batch, length).to(model.device)
