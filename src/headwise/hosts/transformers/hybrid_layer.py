"""Hybrid layer: attention beside a convolution or a state space -> rows to `LayerCache`; states stay.

Falcon-H1 and its like: one layer of the model has both, and one layer of the cache serves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from headwise.errors import CacheStateError
from headwise.hosts.transformers.attention import PassObserver
from headwise.hosts.transformers.layer import HeadwiseLayer
from headwise.hosts.transformers.stock_layers import restore_stock, stock_state
from headwise.stages.layer import LayerCache
from headwise.types import Int, Tensor

# What names of states begin with beside those of rows.
_STATES = "linear:"


class HybridLayer(LinearAttentionLayer, HeadwiseLayer):
    """A layer whose attention is compressed, and whose states are small and stay.

    Args:
        core, stock, owner, model_name: as for `HeadwiseLayer`.
    """

    is_compileable = False

    def __init__(
        self, core: LayerCache, stock: CacheLayerMixin, owner: Callable[[], PassObserver | None], model_name: str
    ) -> None:
        HeadwiseLayer.__init__(self, core, stock, owner, model_name)
        LinearAttentionLayer.__init__(self, number_of_states=stock.number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of rows where it is given keys and values, of states where it is given those by name."""
        part = HeadwiseLayer if args else LinearAttentionLayer
        part.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        """Forget everything; the next prompt may have another number of sequences."""
        HeadwiseLayer.reset(self)
        LinearAttentionLayer.__init__(self, number_of_states=self.number_of_states)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` restores the exact state: never once there is a running state."""
        states: bool = LinearAttentionLayer.is_croppable.fget(self)
        return states and HeadwiseLayer.is_croppable.fget(self)  # type: ignore[attr-defined]  # a property

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse what `crop` would refuse, and change nothing.

        Raises:
            InputError, CacheStateError: as of other layers; and where a running state has seen those tokens.
        """
        HeadwiseLayer.check_crop(self, tokens_to_remove)
        if tokens_to_remove and (any(self.is_recurrent_states_initialized.values()) or not self.record_past):
            raise CacheStateError(
                f"cannot remove {-tokens_to_remove} tokens: layer {self.core.index} has a running state beside its "
                "attention, in which they are; reset() the cache and start again"
            )

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the newest `-tokens_to_remove` tokens."""
        HeadwiseLayer.crop(self, tokens_to_remove)
        if self.record_past:
            LinearAttentionLayer.crop(self, int(tokens_to_remove))

    def reorder_cache(self, beam_idx: Int[Tensor, " new"]) -> None:
        """Continue the beams at those indices."""
        HeadwiseLayer.reorder_cache(self, beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at those indices (whole numbers or a boolean mask)."""
        HeadwiseLayer.batch_select_indices(self, indices)
        self._select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        HeadwiseLayer.batch_repeat_interleave(self, repeats)
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                states[index] = None if state is None else state.repeat_interleave(repeats, dim=0)

    def offload(self) -> None:
        """Move everything to main memory."""
        HeadwiseLayer.offload(self)
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        """Bring everything back to where the model computes."""
        HeadwiseLayer.prefetch(self)
        LinearAttentionLayer.prefetch(self)

    def state(self) -> tuple[dict[str, Tensor], dict[str, bool | int]]:
        """Rows, and states beside them."""
        tensors, plain = HeadwiseLayer.state(self)
        own, flags = stock_state(self)
        return (
            tensors | {_STATES + name: tensor for name, tensor in own.items()},
            plain | {name: flag for name, flag in flags.items() if name.endswith("]")},
        )

    def restore(self, tensors: dict[str, Tensor], plain: dict[str, bool | int]) -> None:
        """Take back what `state` gave."""
        own = {name.removeprefix(_STATES): tensor for name, tensor in tensors.items() if name.startswith(_STATES)}
        HeadwiseLayer.restore(self, {name: t for name, t in tensors.items() if not name.startswith(_STATES)}, {})
        restore_stock(self, own, plain)

    def held(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        return [*HeadwiseLayer.held(self), *stock_state(self)[0].values()]

    def _select(self, indices: Int[Tensor, " new"]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                states[index] = None if state is None else state.index_select(0, indices.to(state.device))


def layer_kind(stock: CacheLayerMixin) -> type[HeadwiseLayer]:
    """The layer that takes the place of one of transformers'."""
    return HybridLayer if isinstance(stock, LinearAttentionLayer) else HeadwiseLayer
