"""Plugin: vLLM, when it loads its plugins -> layers of full attention whose blocks can be compacted.

Everything is registered where vLLM documents it, but for one thing: vLLM does not tell those who refuse requests how
its engine is configured, so that two methods of the object that takes requests in are wrapped.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from headwise.hosts.vllm import metrics
from headwise.hosts.vllm.engine import ENGINE, RESUMABLE, UNKNOWN, Engine, tries_gpu, version_obstacle

_log = logging.getLogger(__name__)


def register() -> None:
    """Called in every process of vLLM; any number of times."""
    reason = version_obstacle()
    if reason is not None:
        # Requests that ask for it are refused; others are as without it.
        UNKNOWN.obstacle = reason
        _log.warning("headwise is not active: %s", reason)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from headwise.hosts.vllm.manager import HeadwiseManager, HeadwiseSpec

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(HeadwiseSpec, HeadwiseManager, FullAttentionSpec)
    # A backend of its own is refused on CPUs.
    register_backend(AttentionBackendEnum.CPU_ATTN, "headwise.hosts.vllm.cpu.HeadwiseBackend")
    if tries_gpu():
        register_backend(AttentionBackendEnum.FLASH_ATTN, "headwise.hosts.vllm.flash.HeadwiseFlashBackend")
    metrics.tell()
    _look_at_engines()


def _look_at_engines() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    made, taken = InputProcessor.__init__, InputProcessor.process_inputs
    if hasattr(made, "__wrapped__"):
        return

    @functools.wraps(made)
    def make(self: Any, vllm_config: Any, *given: Any, **named: Any) -> None:
        self._headwise = Engine(vllm_config)
        made(self, vllm_config, *given, **named)

    @functools.wraps(taken)
    def take(self: Any, request_id: str, prompt: Any, params: Any, *given: Any, **named: Any) -> Any:
        engine, more = ENGINE.set(self._headwise), RESUMABLE.set(bool(named.get("resumable")))
        try:
            # The caller's own parameters stay as they are.
            own = params.clone() if hasattr(params, "extra_args") else params
            return taken(self, request_id, prompt, own, *given, **named)
        finally:
            ENGINE.reset(engine)
            RESUMABLE.reset(more)

    InputProcessor.__init__, InputProcessor.process_inputs = make, take
