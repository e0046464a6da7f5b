"""CPU: vLLM's attention backend for CPUs -> the same, and compacted requests."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from headwise.hosts.vllm.backend import CompactingBuilder, CompactingImpl, compacting_spec
from headwise.hosts.vllm.cpu_pages import CpuPages
from headwise.types import Tensor


class HeadwiseBackend(CPUAttentionBackend):
    """vLLM's own for CPUs, and compacted requests."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Let layers of full attention have blocks that are managed here."""
        return compacting_spec(super().customize_spec(spec))

    @staticmethod
    def get_impl_cls() -> type[HeadwiseImpl]:
        """What attends."""
        return HeadwiseImpl

    @staticmethod
    def get_builder_cls() -> type[HeadwiseBuilder]:
        """What looks at a batch."""
        return HeadwiseBuilder


class HeadwiseBuilder(CompactingBuilder, CPUAttentionMetadataBuilder):
    """Sorts the requests of a batch."""


class HeadwiseImpl(CompactingImpl, CPUAttentionBackendImpl):
    """Attention of one layer."""

    def pages(self, layer: Any, kv_cache: Tensor) -> CpuPages:
        """Of the layer."""
        return CpuPages(kv_cache, layer.isa, self)
