"""Tiny random models of every family, the ten ways to generate, and prompts and a tokenizer that go with them."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field

import torch
from jaxtyping import config as jaxtyping_config
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.generation.streamers import BaseStreamer

from headwise import HeadwiseCache
from tiny import PUNCTUATION, VOCABULARY, left_padded

# Operations of this size only lose time by handing work to other threads.
torch.set_num_threads(1)

LAYERS, HIDDEN = 3, 64
_COMMON = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 2,
}
_USUAL = _COMMON | {
    "hidden_size": HIDDEN,
    "intermediate_size": 52,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# What any family takes; a test says which layers.
SMALL = {name: _USUAL[name] for name in _USUAL if not name.endswith("_token_id") and name != "num_hidden_layers"} | {
    "intermediate_size": 96
}
_MIXED = _USUAL | {
    "head_dim": 16,
    "sliding_window": 11,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
_BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_USUAL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_USUAL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_USUAL, head_dim=16)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**_USUAL, sliding_window=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_USUAL, sliding_window=None)),
    "gemma3": lambda: Gemma3ForCausalLM(
        # With tied embeddings it repeats the last token, whatever the cache holds.
        Gemma3TextConfig(**_MIXED, query_pre_attn_scalar=16, tie_word_embeddings=False)
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_USUAL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_COMMON, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=512)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **_COMMON,
            hidden_size=HIDDEN,
            intermediate_size=52,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=512,
        )
    ),
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **_MIXED,
            num_local_experts=3,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        )
    ),
}
FAMILIES = tuple(_BUILDERS)
# All of its layers slide over a window, so there is nothing to compress.
ALL_SLIDING = "mistral-window"
COMPRESSIBLE = tuple(family for family in FAMILIES if family != ALL_SLIDING)
# Their first layer slides; the cache of it stays transformers' own.
MIXED = ("gemma3", "gpt-oss")


def build(family, seed=0):
    """A model of that family with `eager` attention, ready for inference."""
    torch.manual_seed(seed)
    model = _BUILDERS[family]().eval()
    model.set_attn_implementation("eager")
    return model


shared = functools.cache(build)


def full_layers(family):
    """Indices of the layers that headwise compresses."""
    return range(1, LAYERS) if family in MIXED else range(0 if family != ALL_SLIDING else LAYERS, LAYERS)


# Prompts.


PROMPT, PADDING, NEW, TURN = 40, 13, 24, 9


def prompt(length=PROMPT, seed=0):
    """Ids with BOS first and some punctuation and further special tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, VOCABULARY, (1, length), generator=generator)
    draw = torch.rand(1, length, generator=generator)
    ids[draw < 0.2] = 3 + ids[draw < 0.2] % len(PUNCTUATION)
    ids[draw > 0.9] = 1
    ids[:, 0] = 0
    return ids


@functools.cache
def lookup_prompt(model):
    """A prompt of four words for which look-up proposes tokens of which this model takes some, and not all."""
    for seed in (6, 20, *range(100)):
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(8, VOCABULARY, (4,), generator=generator)
        words[3] = 4
        ids = words[torch.randint(0, 4, (1, PROMPT), generator=generator)]
        ids[:, 0] = 0
        stock = _WatchedStock(config=model.config)
        with count_columns(model) as columns:
            generate(model, ids, stock, prompt_lookup_num_tokens=3)
        proposed = sum(columns) - PROMPT - (len(columns) - 1)
        if 3 <= sum(stock.removed) <= proposed - 3:
            return ids
    raise AssertionError("no prompt found")


@contextlib.contextmanager
def count_columns(model):
    """Number of new tokens of every forward pass."""
    columns = []

    def note(module, args, kwargs):
        columns.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield columns
    finally:
        handle.remove()


class _WatchedStock(DynamicCache):
    def __init__(self, **options):
        super().__init__(**options)
        self.removed = []

    def crop(self, tokens_to_remove):
        super().crop(tokens_to_remove)
        self.removed.append(-int(tokens_to_remove))


def padded_pair():
    """Two prompts as one batch, the first with `PADDING` pads on its left, and its mask."""
    return left_padded(prompt(PROMPT - PADDING, seed=1)[0], prompt(seed=2)[0])


# The ten modes: (model, cache) -> token ids.


class Recorder(BaseStreamer):
    """Keeps what it is given, in order."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@dataclass
class Log:
    """What happened to a cache: shape of every pass, columns removed and orders taken, and the ids of its rows."""

    passes: list = field(default_factory=list)
    removed: list = field(default_factory=list)
    orders: list = field(default_factory=list)
    ids: torch.Tensor | None = None


class WatchedCache(HeadwiseCache):
    """Keeps a log of what `generate` does to it."""

    def __init__(self, *args, **options):
        self.log = Log()
        super().__init__(*args, **{"evict_every": 1, **options})

    def begin_pass(self, input_ids):
        super().begin_pass(input_ids)
        log = self.log
        log.passes.append(tuple(input_ids.shape))
        log.ids = input_ids if log.ids is None else torch.cat([log.ids, input_ids], dim=1)

    def crop(self, tokens_to_remove):
        super().crop(tokens_to_remove)
        self.log.removed.append(-int(tokens_to_remove))
        self.log.ids = self.log.ids[:, : self.log.ids.shape[1] - self.log.removed[-1]]

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.log.orders.append(beam_idx.tolist())
        self.log.ids = self.log.ids[beam_idx]


@contextlib.contextmanager
def unchecked_shapes():
    """Without the checks of shapes, where a run has them; they take most of the time of models this small."""
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)


def generate(model, ids, cache=None, **options):
    """Plain `generate` with its defaults spelled out; without a cache it makes transformers' own."""
    # A mask, or `generate` takes every id 2 that it generated itself for padding at the second turn.
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 2, "attention_mask": mask} | options
    return model.generate(ids, past_key_values=cache, **options)


def _sampled(model, cache, **options):
    torch.manual_seed(7)
    return generate(model, prompt(), cache, do_sample=True, temperature=1.3, **options)


def _batch(model, cache, **options):
    ids, mask = padded_pair()
    return generate(model, ids, cache, attention_mask=mask, **options)


def _streamed(model, cache):
    streamer = Recorder()
    out = generate(model, prompt(), cache, streamer=streamer)
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended
    return out


def _two_turns(model, cache):
    # The stock cache is passed too: without one the second turn would start from nothing.
    cache = DynamicCache(config=model.config) if cache is None else cache
    ids = generate(model, prompt(), cache)
    ids = torch.cat([ids, prompt(TURN + 1, seed=3)[:, 1:]], dim=1)
    return generate(model, ids, cache)


MODES = {
    "greedy": lambda model, cache: generate(model, prompt(), cache),
    "sampling": _sampled,
    "beams": lambda model, cache: generate(model, prompt(), cache, num_beams=3),
    "padded": _batch,
    "padded-beams": functools.partial(_batch, num_beams=2),
    "several": functools.partial(_sampled, num_return_sequences=3, max_new_tokens=12),
    "lookup": lambda model, cache: generate(model, lookup_prompt(model), cache, prompt_lookup_num_tokens=3),
    "chunked": lambda model, cache: generate(model, prompt(), cache, prefill_chunk_size=7),
    "streaming": _streamed,
    "two-turns": _two_turns,
}
