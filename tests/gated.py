"""Gated: a small model -> gates for it that nobody trained."""

from __future__ import annotations

import torch

from headwise.gate.gate import Gates, LayerGate
from headwise.gate.inputs import PLACE
from headwise.weights import sample_weights

WIDTH = 9


def random_gate(inputs, heads, seed):
    draw = torch.Generator().manual_seed(seed)
    shapes = ((inputs,), (inputs,), (inputs, WIDTH), (WIDTH,), (WIDTH, heads), (heads,))
    weights = [torch.randn(shape, generator=draw) for shape in shapes]
    weights[1] = weights[1].abs() + 0.5
    # In half precision as on disk; and scores that are below 1.
    weights[4] *= 0.2
    weights[5] -= 4
    return LayerGate(*(weight.half().float() for weight in weights))


def gates_for(model, seed=0):
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = {n: random_gate(heads * dim + PLACE, heads, seed + n) for n in range(config.num_hidden_layers)}
    return Gates(layers, {"model": type(model).__name__}, sample_weights(model))
