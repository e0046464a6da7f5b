"""A small model with random weights inside vLLM, and in transformers with every head's kept rows masked in."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headwise.gate.checkpoint import save_gates
from headwise.gate.gate import Gates, LayerGate
from headwise.hosts.vllm import prompts
from headwise.hosts.vllm.options import GATES
from headwise.weights import sample_weights

# The engine in this process, so that tests see its blocks; and threads as the tests have them.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

BLOCK = 32
HEADS, KV_HEADS, LAYERS, DIM = 6, 3, 3, 32


def save_model(folder, vocabulary=211):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HEADS * DIM,
        intermediate_size=160,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=4096,
        # Sharper than a trained model starts: heads must differ for a choice to matter.
        initializer_range=0.12,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    save_gates(some_gates(model), Path(folder) / "gates")
    return folder


def some_gates(model):
    """Not trained: what they predict is as good as any for what becomes of it."""
    channels, width, layers = KV_HEADS * DIM + 4, 5, {}
    for index in range(LAYERS):
        level = torch.linspace(-12, -8, KV_HEADS)
        networks = torch.randn(channels, width) / 9, torch.randn(width), torch.randn(width, KV_HEADS), level
        layers[index] = LayerGate(torch.zeros(channels), torch.ones(channels), *networks)
    return Gates(layers, {"model": "this one"}, sample_weights(model))


def start(folder, *, megabytes=16, **options):
    from vllm import LLM

    given = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 4096,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": megabytes * 2**20,
        "enforce_eager": True,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 16,
        "seed": 0,
    }
    os.environ[GATES] = str(Path(folder) / "gates")
    return LLM(**given | options)


def params(policy=None, ratio=0.25, tokens=8, **options):
    from vllm import SamplingParams

    extra = None if policy is None else {"headwise": {"policy": policy, "ratio": ratio}}
    given = {"temperature": 0, "max_tokens": tokens, "logprobs": 0, "detokenize": False, "ignore_eos": True}
    return SamplingParams(**given | options, extra_args=extra)


def prompt(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    # Words come again, so that attention has something to look for.
    words = torch.randint(0, 211, (max(1, tokens // 4),), generator=generator)
    return words[torch.randint(0, len(words), (tokens,), generator=generator)].tolist()


def scheduler(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def pool(llm):
    return scheduler(llm).kv_cache_manager.block_pool


def free_blocks(llm):
    return pool(llm).get_num_free_blocks()


class Kept:
    """Which rows of a prompt every layer and head kept, by the prompt's length; the newest choice counts."""

    def __init__(self, monkeypatch):
        self.rows, self.choices = {}, 0
        place, place_all = prompts.Prompt.place, prompts.Prompt.place_all

        def note(own, layer, rows):
            before = self.rows.setdefault(own.blocks.tokens, {}).get(layer)
            chosen = [each.clone() for each in rows]
            if before is not None:
                # A request that was put off is read again, and the same is chosen.
                assert all(torch.equal(one, other) for one, other in zip(before, chosen, strict=True))
            self.rows[own.blocks.tokens][layer] = chosen
            self.choices += 1

        def noted(own, layer, first, rows):
            note(own, layer, rows)
            return place(own, layer, first, rows)

        def all_noted(own, first, rows, places):
            for layer, heads in enumerate(rows):
                note(own, layer, [each.long() for each in heads])
            return place_all(own, first, rows, places)

        monkeypatch.setattr(prompts.Prompt, "place", noted)
        monkeypatch.setattr(prompts.Prompt, "place_all", all_noted)


def expected(folder, prompt_ids, new, kept, block=BLOCK):
    """Log-probabilities of all tokens at the places of the new ones.

    Args:
        kept: rows of every head by layer; None where all of the prompt stays.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    total, length = len(prompt_ids) + len(new), len(prompt_ids)
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    masks = causal.expand(LAYERS, HEADS, -1, -1).clone()
    for layer, heads in (kept or {}).items():
        for head, rows in enumerate(heads):
            hidden = torch.ones(length // block * block, dtype=torch.bool)
            hidden[rows] = False
            group = slice(head * HEADS // KV_HEADS, (head + 1) * HEADS // KV_HEADS)
            masks[layer, group, length:, : len(hidden)] &= ~hidden

    def attend(module, query, keys, values, mask, scaling, **_):
        keys, values = (each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (keys, values))
        logits = (query @ keys.mT * scaling).masked_fill(~masks[module.layer_idx], -torch.inf)
        return (logits.softmax(dim=-1) @ values).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("kept rows", attend)
    model.config._attn_implementation = "kept rows"
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt_ids, *new]]), use_cache=False).logits[0]
    return logits[length - 1 : -1].log_softmax(dim=-1)


def check(folder, prompt_ids, output, kept, block=BLOCK):
    """Every new token is the likeliest of the reference, and as likely as there."""
    new = list(output.token_ids)
    found = torch.tensor([step[token].logprob for step, token in zip(output.logprobs, new, strict=True)])
    likely = expected(folder, prompt_ids, new, kept, block)
    assert likely.argmax(dim=-1).tolist() == new
    torch.testing.assert_close(found, likely.gather(1, torch.tensor(new)[:, None])[:, 0], atol=1e-4, rtol=0)
