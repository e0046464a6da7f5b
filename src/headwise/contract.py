"""Contract of a host: what the stages must know of a model, whoever runs it.

A host is one folder under `hosts/`. When a cache is made, it
1. makes `ModelFacts` of its model, and refuses what it cannot serve;
2. takes kernels (`kernels.backends.choose`) and a configuration of every layer (`stages.assemble.assemble`);
3. makes a `stages.token_log.TokenLog`, a `LayerCore` (`stages.layer.LayerCache`) of each compressed layer, and one
   `stages.whole_model.WholeModel` of them.
Before every pass it announces the kinds of the new tokens to the log, where the policy asks for them, then calls
`WholeModel.choose` and `take_in`; in the pass each compressed layer calls `LayerCore.attend` instead of attention, and
layers that read its keys too call `LayerCore.attend_again`; after it, `WholeModel.choose` again. The host lets the
model repeat a prompt where the policy asks for it, and counts what its own layers hold on to. `stages.capture` has what
a captured step needs beside that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from headwise.types import Bool, Float, LogitOptions, Rotation, Tensor

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer stores of a token.

    Attributes:
        heads: KV heads.
        key_dim, value_dim: channels of a head.
    """

    heads: int
    key_dim: int
    value_dim: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a token's keys and values, as a full cache has them."""
        return self.heads * (self.key_dim + self.value_dim) * dtype.itemsize


@dataclass(frozen=True)
class LayerFacts:
    """One layer of a model.

    Attributes:
        compressed: whether headwise takes over its cache; the host keeps what it has of the others.
        shape: None where the layer has no attention, or its shape cannot be told.
        rotation: its rotary embedding; None where it has none that is known.
        obstacle: why a layer of full attention is not compressed; None where it is one that is, or none.
        readers: layers of the model that read its keys and values, itself included.
        query_heads: of its attention; 0 where they cannot be told.
    """

    compressed: bool
    shape: LayerShape | None = None
    rotation: Rotation | None = None
    obstacle: str | None = None
    readers: int = 1
    query_heads: int = 0


@dataclass(frozen=True)
class ModelFacts:
    """A model, as far as the stages look at it.

    Attributes:
        name: for messages.
        module: its weights, by which it is known again.
        layers: all of them, in order.
    """

    name: str
    module: nn.Module
    dtype: torch.dtype
    device: torch.device
    layers: tuple[LayerFacts, ...]

    @property
    def compressed_shapes(self) -> list[LayerShape]:
        """Of the layers that headwise compresses, as far as they can be told."""
        return [layer.shape for layer in self.layers if layer.compressed and layer.shape is not None]

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a token's keys and values in all layers, as a full cache has them."""
        return sum(layer.shape.token_bytes(dtype) for layer in self.layers if layer.shape is not None)


class LayerCore(Protocol):
    """What a host asks of a layer in a forward pass; tests and training put others in the place of `LayerCache`.

    Attributes:
        seen: columns that it was given.
        recording: while on, the tokens of the last pass can be taken back, and nothing is evicted for them.
        readers_left: layers of the model that are still to read, in this pass, what this one keeps.
    """

    seen: int
    recording: bool
    readers_left: int

    def attend(
        self,
        query: Float[Tensor, "b h g q d"],
        keys: Float[Tensor, "b h q d"],
        values: Float[Tensor, "b h q e"],
        mask: Bool[Tensor, "b q t"] | None,
        options: LogitOptions,
    ) -> Float[Tensor, "b h g q e"]:
        """Attend with new tokens over everything kept and themselves, and take them in."""
        ...

    def attend_again(
        self,
        query: Float[Tensor, "b h g q d"],
        keys: Float[Tensor, "b h f d"],
        values: Float[Tensor, "b h f e"],
        mask: Bool[Tensor, "b q t"] | None,
        options: LogitOptions,
    ) -> Float[Tensor, "b h g q e"]:
        """The same for a further layer that reads what this one keeps, where there is one (`LayerFacts.readers`)."""
        ...


def tensors_of(held: object) -> list[Tensor]:
    """Every tensor that is an attribute of an object, or in a dict that is one: what a host's own layer holds on to."""
    values = [
        each for value in vars(held).values() for each in (value.values() if isinstance(value, dict) else [value])
    ]
    return [value for value in values if isinstance(value, Tensor)]
