"""Types: the axis names, how a model makes logits and turns vectors, and what kind a token is.

Axes, in every shape of this package:

    b  sequences of the batch          t  columns: every token the model was given, padding included
    h  KV heads                        n  kept rows of a head (padded to the longest head where dense)
    g  query heads per KV head         f  fresh columns: attended to, but not yet in the store
    q  query rows                      d  head dimension of keys, e of values
    p  pages of a head                 s  rows in a page

A *column* is an index into everything the model was given; a *position* counts the real tokens only, so it is
what the same prompt would have alone. Without padding the two are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
else:
    try:  # Shapes are checked under pytest, where jaxtyping is installed; elsewhere they only document.
        from jaxtyping import Bool, Float, Int, UInt8
    except ImportError:

        class _Shape:
            def __class_getitem__(cls, item: Any) -> Any:
                return item[0]

        Bool = Float = Int = UInt8 = _Shape

__all__ = ["Bool", "Float", "Int", "Kind", "LogitOptions", "Rotation", "Tensor", "UInt8"]

# Rotates vectors `[b, h, n, d]` to the positions `[b, n]`, or back from them where the last argument is True.
Rotation = Callable[[Tensor, Tensor, bool], Tensor]


class Kind(IntFlag):
    """What a token is, as a bit set (the first two: FastGen, section 3.4)."""

    ORDINARY = 0
    SPECIAL = 1
    PUNCTUATION = 2
    # A placeholder, in the place of which the model sees a part of an image or a video, or hears a sound.
    MEDIA = 4


@dataclass(frozen=True)
class LogitOptions:
    """How a model turns query-key products into logits.

    Attributes:
        scaling: factor on the product.
        softcap: logits become `softcap * tanh(logits / softcap)`; None where the model has no soft cap.
        sinks: one learned logit per query head that joins the softmax and has no value; None where there is none.
    """

    scaling: float
    softcap: float | None = None
    sinks: Float[Tensor, "h g"] | None = None
