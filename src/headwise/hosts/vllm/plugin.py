"""Plugin: vLLM, when it loads its plugins -> layers of full attention whose blocks can be compacted.

Everything is registered where vLLM documents it, but for one thing: vLLM does not tell those who refuse requests how
its engine is configured, so that the object that takes requests in is looked at when it is made.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from headwise.hosts.vllm import metrics
from headwise.hosts.vllm.engine import ENGINE, version_obstacle

_log = logging.getLogger(__name__)


def register() -> None:
    """Called in every process of vLLM; any number of times."""
    reason = version_obstacle()
    if reason is not None:
        # Requests that ask for it are refused; others are as without it.
        ENGINE.obstacle = reason
        _log.warning("headwise is not active: %s", reason)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from headwise.hosts.vllm.manager import HeadwiseManager, HeadwiseSpec

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(HeadwiseSpec, HeadwiseManager, FullAttentionSpec)
    # A backend of its own is refused on CPUs.
    register_backend(AttentionBackendEnum.CPU_ATTN, "headwise.hosts.vllm.backend.HeadwiseBackend")
    metrics.tell()
    _look_at_engines()


def _look_at_engines() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    made = InputProcessor.__init__
    if hasattr(made, "__wrapped__"):
        return

    @functools.wraps(made)
    def note(self: Any, vllm_config: Any, *given: Any, **named: Any) -> None:
        ENGINE.note(vllm_config)
        made(self, vllm_config, *given, **named)

    InputProcessor.__init__ = note
