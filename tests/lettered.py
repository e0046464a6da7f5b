"""Lettered: a tokenizer whose ids are letters, so that texts and ids tell one another."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

import tiny


@functools.cache
def tokenizer():
    """A letter for every id, which padding goes before."""
    letters = ["Ġ", *sorted(pre_tokenizers.ByteLevel.alphabet())][: tiny.VOCABULARY - 3]
    words = {"<s>": 0, "</s>": 1, "<pad>": 2} | {letter: index + 3 for index, letter in enumerate(letters)}
    backend = Tokenizer(tokenizer_models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
