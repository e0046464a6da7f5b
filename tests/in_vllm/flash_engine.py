"""Run by a test: an engine with what is meant for GPUs, on a CPU, its kernels in plain torch -> new tokens, as JSON.

vLLM's FlashAttention backend takes the place of that for CPUs; rows lie in its cache as it has them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import engines
import flash_kernels
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from headwise.hosts.vllm import metrics, plugin

POLICIES = ("adakv:over=snapkv", "h2o", "keydiff", None)


def environment():
    """Without what an engine of this process has set for itself."""
    return {name: value for name, value in os.environ.items() if name != metrics.FOLDER}


def asked():
    # Several passes for each, in batches with others.
    ids = [engines.prompt(300 + 211 * number, number) for number in range(8)]
    return ids, [engines.params(POLICIES[number % 4], 0.3, 20) for number in range(8)]


def answers(llm):
    ids, given = asked()
    outputs = llm.generate([{"prompt_token_ids": own} for own in ids], given, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in outputs]


def emulate():
    flash_attn.flash_attn_varlen_func = flash_kernels.paged_attention
    flash_attn.reshape_and_cache_flash = flash_kernels.write_rows
    flash_attn.flash_attn_supports_sinks = lambda *_, **__: True
    flash_attn.get_flash_attn_version = lambda *_, **__: 2
    plugin.register()
    register_backend(AttentionBackendEnum.CPU_ATTN, "headwise.hosts.vllm.flash.HeadwiseFlashBackend")
    # Each process registers it again.
    plugin.register = lambda: None


def main():
    emulate()
    llm = engines.start(Path(sys.argv[1]))
    (layer, *_) = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    sys.stdout.write(json.dumps({"attends": type(layer.impl).__name__, "new": answers(llm)}) + "\n")


if __name__ == "__main__":
    main()
