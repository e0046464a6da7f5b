"""Models: a model -> another of the same weights; a shape -> a model of random weights; and a watch on attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeAlias

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headwise.hosts.transformers.attention import NAME as HEADWISE
from headwise.hosts.transformers.attention import register_interface
from headwise.hosts.transformers.decoder import decoder_of
from headwise.measure.model_info import Shape

# For the modules that do not import transformers.
Model: TypeAlias = PreTrainedModel
Tokenizer: TypeAlias = PreTrainedTokenizerBase


def share_weights(model: Model) -> Model:
    """A model of the same weights, in the same memory, with an attention setting and hooks of its own; runs `sdpa`."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    other = copy.deepcopy(model, memo=shared)
    other.set_attn_implementation("sdpa")
    return other


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> Model:
    """A Llama of that shape with normal random weights, made on the device in that dtype."""
    config = LlamaConfig(**llama_dimensions(shape))
    with torch.device(device):
        model: Model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def llama_dimensions(shape: Shape) -> dict[str, Any]:
    """The shape under the names of a `LlamaConfig`, of any release."""
    return {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.positions,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": None,
    }


@contextmanager
def watched_attention(model: Model, watch: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Let all attention of such models, their own and headwise's, go through what `watch` makes of the function."""
    register_interface()
    names = (decoder_of(model).config._attn_implementation, HEADWISE)
    for name in names:
        ALL_ATTENTION_FUNCTIONS[name] = watch(ALL_ATTENTION_FUNCTIONS[name])
    try:
        yield
    finally:
        # Only the override goes; what is registered stays.
        for name in names:
            del ALL_ATTENTION_FUNCTIONS[name]
