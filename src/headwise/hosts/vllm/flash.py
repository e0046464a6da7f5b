"""Flash: vLLM's attention backend with FlashAttention, on GPUs -> the same, and compacted requests.

Nothing of it has run on a GPU so far: engines there take it only where HEADWISE_VLLM_GPU=1 asks for it, and do not
start where the kernel of that vLLM does not pass a trial.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import flash_attn
from vllm.v1.kv_cache_interface import AttentionSpec

from headwise.hosts.vllm.backend import CompactingBuilder, CompactingImpl, compacting_spec
from headwise.hosts.vllm.flash_pages import FlashPages, check_kernel
from headwise.types import Tensor


class HeadwiseFlashBackend(flash_attn.FlashAttentionBackend):
    """vLLM's own, and compacted requests."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Let layers of full attention have blocks that are managed here."""
        return compacting_spec(super().customize_spec(spec))

    @staticmethod
    def get_impl_cls() -> type[HeadwiseFlashImpl]:
        """What attends."""
        return HeadwiseFlashImpl

    @staticmethod
    def get_builder_cls() -> type[HeadwiseFlashBuilder]:
        """What looks at a batch."""
        return HeadwiseFlashBuilder


class HeadwiseFlashBuilder(CompactingBuilder, flash_attn.FlashAttentionMetadataBuilder):
    """Sorts the requests of a batch.

    Raises:
        UnsupportedModelError: when the engine starts, if the kernel does not pass a trial.
    """

    # A captured graph has one way to attend; and what is known of a batch holds for one group of layers.
    _cudagraph_support = AttentionCGSupport.NEVER
    supports_update_block_table = False

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], *given: Any, **named: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, *given, **named)
        if self.compacts:
            spec, told = kv_cache_spec, {"softmax_scale": kv_cache_spec.head_size**-0.5, "softcap": 0}
            version = flash_attn.get_flash_attn_version(head_size=spec.head_size)
            kernel = partial(flash_attn.flash_attn_varlen_func, fa_version=version, window_size=[-1, -1], **told)
            check_kernel(kernel, spec.dtype, self.device, spec.head_size, spec.block_size)


class HeadwiseFlashImpl(CompactingImpl, flash_attn.FlashAttentionImpl):
    """Attention of one layer."""

    def pages(self, layer: Any, kv_cache: Tensor) -> FlashPages:
        """Of the layer."""
        told = {"softmax_scale": self.scale, "softcap": self.logits_soft_cap, "window_size": [-1, -1]}
        kernel = partial(flash_attn.flash_attn_varlen_func, fa_version=self.vllm_flash_attn_version, **told)
        return FlashPages.of_cache(kv_cache, self.head_size, kernel)
