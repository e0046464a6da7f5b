"""Bearable: the end of a prompt and the formats of a precision -> for every head the first that does not damage it.

A part that all keys of a head have in common, such as a large bias, makes the steps of their codes wide and tells no
key from another. How wide matters only by what queries make of it, so it is these that judge.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

from headwise.errors import HeadwiseWarning
from headwise.quant.codes import decode, encode, hadamard
from headwise.quant.formats import Precision
from headwise.types import Bool, Float, Int, Tensor

# Newest queries that judge, and newest columns that are judged.
JUDGES, _COLUMNS = 16, 512

# What rounding may move the logits of a query against each other (standard deviation, in nats), and values as a share
# of what tells them apart. With 4 bits no head of the default model comes beyond (docs/quantization.md).
_LOGITS, _VALUES = 0.8, 0.5
# Share of the values' mean square up to which they count as the same.
_SAME = 1e-3

_GIVEN = "they get as many bits as they need, and take more bytes; report().formats says which"
_LATER = "rows that come after the prompt stay exact there, and take more bytes"


def bearable_formats(
    precision: Precision,
    query: Float[Tensor, "b h g q d"],
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t e"],
    real: Bool[Tensor, "b t"],
    positions: Int[Tensor, "b t"],
    scaling: float,
) -> Int[Tensor, "b h"]:
    """Index into the precision's formats, -1 for a head that bears none of them; a warning says if any needs more bits.

    What holds numbers that are none, or a single row, is not judged. Where the policy has chosen by itself, heads are
    only judged by the format of later rows.

    Args:
        query: of the newest columns.
        real, positions: of every column.
    """
    query, newest = query[:, :, :, -JUDGES:].float(), real[:, -min(JUDGES, query.shape[3]) :]
    keys, values, real = keys[:, :, -_COLUMNS:], values[:, :, -_COLUMNS:], real[:, -_COLUMNS:]
    # Sinks stay exact, and are unlike all others; of a prompt that has little else they must do.
    inner = real & (positions[:, -_COLUMNS:] >= precision.sinks)
    counted = torch.where(inner.sum(dim=1, keepdim=True) > 1, inner, real)

    def logits(errors: Float[Tensor, "b h t d"]) -> Float[Tensor, "b h"]:
        moved = (query * scaling) @ errors[:, :, None].transpose(-2, -1)
        each = _variance(moved, counted[:, None, None, None]).masked_fill(~newest[:, None, None], 0)
        return (each.sum(dim=(2, 3)) / (newest.sum(dim=1)[:, None] * query.shape[2]).clamp(min=1)).sqrt() / _LOGITS

    def share(errors: Float[Tensor, "b h t e"]) -> Float[Tensor, "b h"]:
        numbers = values.float()
        wrong, apart = (_variance(rows.transpose(-2, -1), counted[:, None, None]).sum(-1) for rows in (errors, numbers))
        # Where all are nearly the same, as of a text that repeats itself, nothing is lost.
        size = numbers.square().mean(dim=2).sum(-1)
        return (wrong / (apart + _SAME * size)).sqrt() / _VALUES

    offered = precision.formats if precision.later is None else (precision.formats[precision.later],)
    key_bits = _bits(keys, [format.key_bits for format in offered], offered[0].group, logits)
    value_bits = _bits(values, [format.value_bits for format in offered], offered[0].group, share)
    formats = torch.full_like(key_bits, -1)
    for index, format in enumerate(offered):
        formats[(key_bits == format.key_bits) & (value_bits == format.value_bits)] = index
    if bool((formats != 0).any()):
        remedy = _GIVEN if precision.later is None else _LATER
        warnings.warn(
            f"rounded to {offered[0]}, some heads would answer otherwise: their keys or values have a large part in "
            f"common, as where a model has large biases; {remedy}",
            HeadwiseWarning,
            stacklevel=2,
        )
    return formats


def _bits(
    rows: Float[Tensor, "b h t d"], offered: Sequence[int], group: int | None, damage: Callable[[Tensor], Tensor]
) -> Int[Tensor, "b h"]:
    """The fewest of the bits offered with which every head is damaged by no more than 1; 0 where all are too few."""
    found = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
    turn, numbers = hadamard(rows.shape[-1], rows.device), rows.float()
    for bits in sorted(set(offered)):
        codes = encode(numbers @ turn, bits, group or rows.shape[-1])
        too_few = damage(decode(*codes, bits) @ turn.T - numbers) > 1
        found = found.where((found > 0) | too_few, bits)
        if bool((found > 0).all()):
            break
    return found


def _variance(numbers: Tensor, counted: Tensor) -> Tensor:
    """Along the last dimension, of those that are counted."""
    numbers, count = numbers.where(counted, 0), counted.sum(dim=-1)
    centred = (numbers - (numbers.sum(dim=-1) / count.clamp(min=1))[..., None]).where(counted, 0)
    return centred.square().sum(dim=-1) / count.clamp(min=1)
