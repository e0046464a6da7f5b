"""Layer: transformers' calls on one cache layer -> `LayerCache`, which does the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from headwise.contract import tensors_of
from headwise.errors import CacheStateError, InputError, MismatchError
from headwise.hosts.transformers.attention import LAYER_ATTRIBUTE, PassObserver, active_cache
from headwise.report.layer_report import LayerReport
from headwise.stages.layer import LayerCache
from headwise.stages.saved import load_layer, save_layer
from headwise.types import Bool, Float, Int, LogitOptions, Tensor


class HeadwiseLayer(CacheLayerMixin):
    """One full-attention layer of a `HeadwiseCache`: transformers' calls in, `LayerCache`'s work done.

    Args:
        core: does the work.
        stock: the layer that transformers would have; what is asked of a layer and is not about keys and values is
            answered by it.
        owner: the cache it belongs to, held weakly: a cache must be freed the moment its user drops it, not at the
            next garbage collection.
        model_name: for messages.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(
        self, core: LayerCache, stock: CacheLayerMixin, owner: Callable[[], PassObserver | None], model_name: str
    ) -> None:
        super().__init__()
        self.core = core
        self.stock = stock
        self.awaits_attention = False
        self._owner = owner
        self._model_name = model_name

    def __getattr__(self, name: str) -> Any:
        # Only for what this class does not have; not before `stock` is there, as when a copy is made.
        if name.startswith("__") or "stock" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.stock, name)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take note of where the tensors are; the store is made when the prompt has been profiled."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "b h q d"],
        value_states: Float[Tensor, "b h q e"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b h q e"]]:
        """Pass new keys and values on to the attention function, which attends first and evicts then.

        Raises:
            MismatchError: when another model than the cache's own calls.
            CacheStateError: when the attention of the previous call never came.
        """
        owner = self._owner()
        if owner is None or active_cache.get() is not owner:
            raise MismatchError(
                f"this cache was made for a {self._model_name} and is used by another model or outside a forward pass; "
                "make one cache per model"
            )
        if self.awaits_attention:
            raise CacheStateError(
                f"layer {self.core.index} was updated twice without attention in between: this pass computes attention "
                "elsewhere than through transformers' interface"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.awaits_attention = True
        # A view, so that the attribute does not tie the tensor that is kept to this layer.
        keys = key_states.view_as(key_states)
        setattr(keys, LAYER_ATTRIBUTE, self)
        return keys, value_states

    def attend(
        self,
        query: Float[Tensor, "b h g q d"],
        key: Float[Tensor, "b h q d"],
        value: Float[Tensor, "b h q e"],
        mask: Bool[Tensor, "b q t"] | None,
        options: LogitOptions,
    ) -> Float[Tensor, "b h g q e"]:
        """Called back by the attention function with what `update` let through, by each layer that reads it."""
        attend = self.core.attend if self.awaits_attention else self.core.attend_again
        try:
            output = attend(query, key, value, mask, options)
        except InputError:
            # Said before anything changes; after any other the layer is left as if it still waited.
            self.awaits_attention = False
            raise
        self.awaits_attention = False
        return output

    def state(self) -> tuple[dict[str, Tensor], dict[str, bool | int]]:
        """Tensors and plain data that `restore` needs; empty before the first pass.

        Raises:
            CacheStateError: when the prompt is still coming in.
        """
        return save_layer(self.core), {}

    def restore(self, tensors: dict[str, Tensor], plain: dict[str, bool | int]) -> None:
        """Take back what `state` gave."""
        if tensors:
            load_layer(self.core, tensors)
            self.lazy_initialization(tensors["keys"], tensors["values"])

    def held(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        return self.core.tensors()

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not, padding included."""
        return self.core.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical sizes: the decode stage picks the columns of the kept rows itself."""
        return self.core.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` restores the exact state: until something is evicted or ranked."""
        return self.core.restorable

    @property
    def record_past(self) -> bool:
        """While on, the tokens of the last pass can be taken back by `crop` and nothing is evicted for them."""
        return self.core.recording

    @record_past.setter
    def record_past(self, on: bool) -> None:
        self.core.recording = on
        if not on:
            self.core.accept()

    def activate_past_recording(self) -> None:
        """Let the next calls of `crop` take back tokens of the pass before them (assisted decoding)."""
        self.core.recording = True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse what `crop` would refuse, and change nothing.

        Raises:
            InputError: for a positive number, whose meaning changed between releases of transformers.
            CacheStateError: when those tokens have already had an effect that cannot be undone.
        """
        if tokens_to_remove > 0:
            raise InputError(f"crop takes 0 or minus the number of tokens to remove, got {tokens_to_remove}")
        self.core.check_take_back(-tokens_to_remove)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the newest `-tokens_to_remove` tokens.

        Raises:
            InputError: for a positive number, whose meaning changed between releases of transformers.
            CacheStateError: when those tokens have already had an effect that cannot be undone.
        """
        # 5.17 hands over a tensor.
        tokens_to_remove = int(tokens_to_remove)
        self.check_crop(tokens_to_remove)
        self.core.take_back(-tokens_to_remove)

    def reset(self) -> None:
        """Forget everything; the cache can then serve another prompt."""
        self.core.reset()
        self.is_initialized = False
        self.awaits_attention = False

    def reorder_cache(self, beam_idx: Int[Tensor, " new"]) -> None:
        """Continue the beams at those indices."""
        self.core.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at those indices (whole numbers or a boolean mask)."""
        self.core.select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        kept = self.core.kept_tokens
        if kept is not None:
            self.core.select(torch.arange(len(kept), device="cpu").repeat_interleave(repeats))

    def offload(self) -> None:
        """Move the rows to main memory."""
        self.core.to(torch.device("cpu"))

    def prefetch(self) -> None:
        """Bring the rows back to where the model computes."""
        if self.is_initialized:
            self.core.to(self.device)


def held_tensors(layer: CacheLayerMixin) -> list[Tensor]:
    """Every tensor that a layer of a cache holds on to, headwise's or transformers' own."""
    return layer.held() if isinstance(layer, HeadwiseLayer) else tensors_of(layer)


def layer_report(layer: CacheLayerMixin) -> LayerReport:
    """What a layer of a cache holds, headwise's or transformers' own."""
    return LayerReport.of(layer.core) if isinstance(layer, HeadwiseLayer) else LayerReport.of_stock(tensors_of(layer))
