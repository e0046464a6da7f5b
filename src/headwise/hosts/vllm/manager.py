"""Manager: requests that are compressed -> their blocks, of which most go back to the pool once the prompt is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request

from headwise.hosts.vllm.metrics import count
from headwise.hosts.vllm.options import Options, options_of


@dataclass(frozen=True, kw_only=True)
class HeadwiseSpec(FullAttentionSpec):
    """Layers of full attention, whose blocks are managed here."""


class HeadwiseManager(FullAttentionManager):
    """As for full attention, but for requests that are compressed."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._caches_prefixes: bool = self.enable_caching
        # Otherwise it is not told of requests at all.
        self.enable_caching: bool = True
        self._options: dict[str, Options] = {}

    def cache_blocks(self, request: Request, *given: Any, **named: Any) -> None:
        """Offer the blocks of a request to others with the same prefix; not those that are going to be rewritten."""
        options = options_of(None if request.sampling_params is None else request.sampling_params.extra_args)
        if options is not None:
            if request.request_id not in self._options and not request.num_preemptions:
                count("requests", 1, options.name)
            self._options[request.request_id] = options
        elif self._caches_prefixes:
            super().cache_blocks(request, *given, **named)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what a compressed request no longer needs, when its prompt was read."""
        options = self._options.get(request_id)
        if options is None:
            super().remove_skipped_blocks(request_id, processed_computed_tokens, num_prompt_tokens)
        elif num_prompt_tokens is not None and processed_computed_tokens >= num_prompt_tokens:
            whole, stay = options.blocks(num_prompt_tokens, self.block_size)
            before = self.block_pool.get_num_free_blocks()
            self._remove_blocks_in_range(request_id, stay, whole)
            freed = self.block_pool.get_num_free_blocks() - before
            if freed:
                count("blocks_kept", stay, options.name)
                count("blocks_freed", freed, options.name)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request."""
        self._options.pop(request_id, None)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks
