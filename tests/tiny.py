"""A tiny random Llama with grouped queries, and a tokenizer whose ids have known kinds."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 101
SPECIAL_IDS = (0, 1, 2)
PUNCTUATION = {3: ".", 4: ",", 5: "?!", 6: "—", 7: "»"}


def tokenizer():
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, **{text: token for token, text in PUNCTUATION.items()}}
    words |= {f"w{token}": token for token in range(8, VOCABULARY)}
    words["a."] = VOCABULARY  # a word with punctuation is an ordinary token
    backend = Tokenizer(models.WordLevel(words, unk_token="w8"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


def llama(*, heads=6, kv_heads=2, layers=3, head_dim=14, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=heads * head_dim,
        head_dim=head_dim,
        intermediate_size=53,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def prompt(length, *, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    ids[:, :1] = 0
    return ids


def left_padded(*prompts):
    """A batch and its attention mask."""
    longest = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), longest), 2)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, p in enumerate(prompts):
        ids[row, longest - len(p) :] = p
        mask[row, longest - len(p) :] = 1
    return ids, mask
