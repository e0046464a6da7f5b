"""Small models: a seed -> models of several families with random weights, small enough for thousands of turns."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY, PAD = 101, 2
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": PAD}
_SIZES = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1 << 17,
    "initializer_range": 0.2,
}


def llama(layers: int = 3) -> PreTrainedModel:
    """The plainest of them."""
    model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**{**_SIZES, "num_hidden_layers": layers})).eval()
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for every token of theirs."""
    words = {f"w{token}": token for token in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")), pad_token=f"w{PAD}", unk_token="w3"
    )


def small_models(seed: int) -> list[PreTrainedModel]:
    """One of each family: rotary and learned positions, norms of queries and keys, sliding layers between full ones."""
    torch.manual_seed(seed)
    mixed = {"sliding_window": 11, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    models = [
        llama(),
        Qwen3ForCausalLM(Qwen3Config(**_SIZES)),
        Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES, **mixed, query_pre_attn_scalar=8, tie_word_embeddings=False)),
        GPT2LMHeadModel(GPT2Config(**_TOKENS, n_embd=32, n_layer=3, n_head=4, n_positions=1024, initializer_range=0.2)),
    ]
    return [model.eval() for model in models]
