"""Models with weights that are the same everywhere, and what was saved with them before modules and classes moved."""

from __future__ import annotations

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from tiny import VOCABULARY

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "head_dim": 8,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 2,
}


def model_of(family):
    """Weights by a formula of whole numbers: no generator of random ones, whose results a release may change."""
    if family == "gemma3":
        kinds = {"sliding_window": 11, "layer_types": ["sliding_attention", "full_attention"]}
        config = Gemma3TextConfig(**_SIZES, **kinds, query_pre_attn_scalar=8, tie_word_embeddings=False)
        model = Gemma3ForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**_SIZES))
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            at = torch.arange(parameter.numel(), dtype=torch.int64)
            values = ((at * 7919 + number * 104729) * (at % 97 + 3) % 1009).double() / 1009 - 0.5
            parameter.copy_(values.float().view_as(parameter))
    return model.eval()


def policies_of(headwise, peaks):
    """By the name of their file: family, policy and options.

    Args:
        peaks: the class that was called Recite when the files were written.
    """
    return {
        "peaks": ("llama", peaks(recovery=0.6, window=8), {}),
        "fastgen": ("llama", headwise.FastGen(0.7), {"markers": ["w31 w47"]}),
        "auto": ("llama", headwise.Auto(ratio=0.5, window=8, recent=4), {}),
        "mixed": ("gemma3", headwise.Quantized(headwise.H2O(heavy=9, recent=8), 8), {}),
    }


def prompt_of():
    """Forty tokens, some of them special, punctuation or a marker."""
    ids = torch.arange(40) * 31 % 89 + 3
    ids[0], ids[7], ids[20], ids[21] = 0, 1, 31, 47
    return ids[None]


def continue_greedily(model, cache, ids, count):
    """Ids that follow, one after the other."""
    found = []
    with torch.no_grad():
        for _ in range(count):
            ids = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            found.append(int(ids))
    return found
