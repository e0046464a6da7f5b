"""A tiny random Llama that is spoken to in a chat template, in bytes: any text is tokens, and any tokens are text."""

from __future__ import annotations

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LAYERS, KV_HEADS = 2, 2
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "The cat sat on the mat, and the dog sat on the log; who sat where? Nobody knows. Ask the cat!"


@functools.cache
def tokenizer(chat=True):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([TEXT] * 4, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    if chat:
        made.chat_template = TEMPLATE
    return made


def model(positions=128):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=positions,
        # Sharper than a trained model starts: heads must differ for the profile to have something to tell.
        initializer_range=0.5,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=tokenizer().pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


def save(path, positions=128):
    model(positions).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
