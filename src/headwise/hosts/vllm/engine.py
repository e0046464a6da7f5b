"""Engine: how vLLM was started -> why requests cannot be compressed in it, or what holds for all of them."""

from __future__ import annotations

import json
import os
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import vllm
from vllm.platforms import current_platform

from headwise.errors import ConfigurationError, UnsupportedModelError
from headwise.hosts.vllm.model import Model, gates_obstacle
from headwise.hosts.vllm.options import KEY, Options, options_of

# For engines: the same JSON object as a request has it.
DEFAULT = "HEADWISE_VLLM_DEFAULT"
# For engines on GPUs.
GPU = "HEADWISE_VLLM_GPU"
SUPPORTED = ("0.29", "0.30", "0.31", "0.32")


# Models whose layers all have one rotary embedding, of the plain kind.
_ROTARY = {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "olmo2", "granite", "phi"}


class Engine:
    """What the process that takes requests knows of an engine.

    Args:
        config: of it; None where nothing is known.

    Attributes:
        obstacle: why nothing can be compressed in it; None where it can.
        default: for requests that say nothing.
        turns: whether it is known how its model makes positions.
        spread_obstacle: why layers cannot share what stays; None where they can.

    Raises:
        ConfigurationError: when the default for all requests cannot be what it says.
    """

    def __init__(self, config: Any = None) -> None:
        self.obstacle: str | None = "its plugin was not loaded (VLLM_PLUGINS)" if config is None else obstacle(config)
        self.turns = config is not None and _turns(config.model_config.hf_text_config)
        self._config = config
        self.spread_obstacle = None if config is None else spread_obstacle(config)
        self.default: Options | None = None if config is None else _default(getattr(config, "additional_config", None))
        if self.default is not None:
            self.check(self.default)

    @cached_property
    def gates_obstacle(self) -> str | None:
        """Why gates cannot be asked for; None where they can. The model's files are read for it, once."""
        return gates_obstacle(self._config)

    @cached_property
    def kinds_obstacle(self) -> str | None:
        """Why kinds of tokens are not known; None where they are. The vocabulary is read for it, once."""
        return Model(self._config).kinds_obstacle()

    def check(self, options: Options) -> None:
        """Refuse what this engine cannot do.

        Raises:
            ConfigurationError: saying why.
        """
        if RESUMABLE.get():
            raise ConfigurationError(
                f"{KEY}: a prompt that comes in parts cannot be compressed, as its end is not known"
            )
        if self.obstacle is not None:
            raise ConfigurationError(f"{KEY}: this engine cannot compress requests: {self.obstacle}")
        policy = options.keeping(1)
        if (policy.needs_rotation or policy.gates is not False) and not self.turns:
            raise ConfigurationError(
                f"{KEY}: {options.policy!r} looks through the model's rotary embedding, and how this model makes "
                "positions is not known; take adakv or snapkv"
            )
        if options.spreads and self.spread_obstacle is not None:
            raise ConfigurationError(
                f"{KEY}: with {options.policy!r} layers share what stays, which cannot be served: "
                f"{self.spread_obstacle}; take adakv or snapkv"
            )
        if policy.gates is not False and self.gates_obstacle is not None:
            raise ConfigurationError(f"{KEY}: {options.policy!r} cannot be served: {self.gates_obstacle}")
        if policy.reads_kinds and self.kinds_obstacle is not None:
            raise ConfigurationError(
                f"{KEY}: {options.policy!r} looks at the kinds of tokens, which this engine does not tell: "
                f"{self.kinds_obstacle}; take adakv or snapkv"
            )


# That a request is being taken in for; and whether more of its prompt may come later.
ENGINE: ContextVar[Engine | None] = ContextVar("engine", default=None)
RESUMABLE = ContextVar("resumable", default=False)
# Where requests are taken in for one that was not seen when it was made.
UNKNOWN = Engine()


def version_obstacle() -> str | None:
    """Why this release of vLLM cannot be served; None where it can."""
    if vllm.__version__.startswith(tuple(f"{each}." for each in SUPPORTED)):
        return None
    return f"headwise knows vLLM {SUPPORTED[0]} to {SUPPORTED[-1]}, and this is {vllm.__version__}"


def _turns(config: Any) -> bool:
    """Whether all layers have one rotary embedding that only turns vectors."""
    rope = getattr(config, "rope_parameters", None) or {}
    plain = rope.get("rope_type", "default") in ("default", "linear", "llama3")
    return bool(rope) and plain and getattr(config, "model_type", None) in _ROTARY


def layout_obstacle(config: Any) -> str | None:
    """Why blocks cannot be compacted on this processor; None where they can."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from headwise.hosts.vllm.cpu_pages import check_layout

    model, cache = config.model_config, config.cache_config
    size, dim = cache.block_size, model.get_head_size()
    try:
        check_layout(2, size, dim, model.dtype, _get_attn_isa(model.dtype, size, dim, cache.cache_dtype))
    except (UnsupportedModelError, RuntimeError) as error:
        # vLLM's kernels refuse sizes that they have not by the latter.
        return str(error).splitlines()[0]
    return None


def gpu_obstacle(config: Any) -> str | None:
    """Why blocks cannot be compacted on this kind of device; None where they can."""
    if current_platform.is_cpu():
        return None
    if not tries_gpu():
        return (
            f"blocks are compacted on CPUs so far; {GPU}=1 has it tried on NVIDIA's GPUs, where nothing of it was run"
        )
    backend = getattr(getattr(config, "attention_config", None), "backend", None)
    if getattr(backend, "name", None) != "FLASH_ATTN":
        return "on GPUs blocks are compacted with FlashAttention alone: start it with --attention-backend FLASH_ATTN"
    return None


def spread_obstacle(config: Any) -> str | None:
    """Why layers cannot share what stays of a prompt; None where they can."""
    reasons = {
        f"their rows lie together since vLLM 0.30, and this is {vllm.__version__}": vllm.__version__.startswith(
            "0.29."
        ),
        "they are of several kinds, whose blocks are not the same": _mixed(config.model_config),
        "it is done on CPUs so far": not current_platform.is_cpu(),
        "each process has some of the layers (pipeline parallel)": config.parallel_config.pipeline_parallel_size > 1,
        "what was chosen is remembered by a prompt's tokens, and with adapters or media they do not say all": (
            getattr(config, "lora_config", None) is not None or config.model_config.is_multimodal_model
        ),
    }
    return next((reason for reason, there in reasons.items() if there), None)


def tries_gpu() -> bool:
    """Whether there is a GPU of NVIDIA's, and what was not run on one is asked for."""
    return bool(current_platform.is_cuda()) and os.environ.get(GPU) == "1"


def _mixed(config: Any) -> bool:
    """Whether some layers of a model have a cache of another kind, such as a window or a state."""
    text = config.hf_text_config
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    windows = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    return bool(kinds or windows or getattr(text, "attention_chunk_size", None) or getattr(config, "is_hybrid", False))


def obstacle(config: Any) -> str | None:
    """Why requests cannot be compressed in an engine of that configuration; None where they can."""
    model, parallel = config.model_config, config.parallel_config
    reasons = {
        version_obstacle(): version_obstacle() is not None,
        gpu_obstacle(config): gpu_obstacle(config) is not None,
        "the model has latent attention (MLA), whose rows belong to all heads": model.use_mla,
        "the model counts distances between rows (ALiBi), which lie elsewhere afterwards": model.uses_alibi,
        "the model does not generate text": model.runner_type != "generate",
        "layers of the model read the keys of others": bool(getattr(model.hf_text_config, "num_kv_shared_layers", 0)),
        "other layers of the model have blocks that requests with the same prefix would find; start it with "
        "--no-enable-prefix-caching": _mixed(model) and bool(config.cache_config.enable_prefix_caching),
        "layers that slide over a window have the same blocks as others (--disable-hybrid-kv-cache-manager)": _mixed(
            model
        )
        and bool(getattr(config.scheduler_config, "disable_hybrid_kv_cache_manager", False)),
        "tokens are drafted (speculative decoding)": config.speculative_config is not None,
        "rows are moved between engines (KV transfer)": config.kv_transfer_config is not None,
        "the cache is in 8 bits": config.cache_config.cache_dtype.startswith("fp8"),
        "contexts are spread over processes (context parallel)": parallel.decode_context_parallel_size > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "batches are computed in parts (--enable-dbo)": bool(getattr(parallel, "use_ubatching", False)),
        "the newer model runner (V2) is used (VLLM_USE_V2_MODEL_RUNNER=0 starts the other)": bool(
            getattr(config, "use_v2_model_runner", False)
        ),
        "prompts may come as embeddings, whose lengths workers are not told": model.enable_prompt_embeds,
    }
    found = next((str(reason) for reason, there in reasons.items() if there), None)
    return found or (layout_obstacle(config) if current_platform.is_cpu() else None)


def _default(additional: Any) -> Options | None:
    said = additional.get(KEY) if isinstance(additional, dict) else None
    written = os.environ.get(DEFAULT)
    if said is None and written:
        try:
            said = json.loads(written)
        except ValueError as error:
            raise ConfigurationError(f"{DEFAULT} is no JSON object: {error}") from error
    return None if said is None else options_of({KEY: said})
