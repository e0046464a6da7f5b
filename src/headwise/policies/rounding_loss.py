"""Rounding loss: what a layer holds at the end of the prompt -> what it costs each head to be stored in fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from headwise.policies.choice import FormatLoss
from headwise.policies.evidence import Evidence
from headwise.quant.codes import hadamard, rounded
from headwise.quant.formats import RowFormat
from headwise.store.row_parts import row_bytes, row_parts
from headwise.types import Float, Tensor

# What a rounding error counts, beside an error as large from dropping a token. Rounding is different for each query,
# head and layer, and averages out; what is dropped is missed by just the queries that need it, in full. The weight was
# found by trying, on other texts than those of the published figures (docs/quantization.md).
_ROUNDING = 0.3


def rounding_loss(
    evidence: Evidence, formats: Sequence[RowFormat], window: int, *, sinks: int, recent: int
) -> FormatLoss:
    """The mean error that rounding makes in what the newest queries get, relative to the size of values.

    Args:
        window: newest queries that count.
        sinks, recent: first and newest rows, which stay exact.
    """
    keys, values = evidence.keys, evidence.values.float()
    exact = ((evidence.position < sinks) | (evidence.age < recent))[..., None]
    turned_keys, turned_values = (rows.float() @ hadamard(rows.shape[-1], rows.device) for rows in (keys, values))
    read = {bits: turned_keys.where(exact, _coded(turned_keys, bits)) for bits in {f.key_bits for f in formats}}
    # An error is as large as it is turned.
    misreads = {bits: _coded(turned_values, bits) - turned_values for bits in {f.value_bits for f in formats}}
    errors = {bits: error.where(~exact, 0) for bits, error in misreads.items()}
    # Sums of squares, over the newest queries, of what outputs are off with those keys, or with those values.
    nothing = torch.zeros((), dtype=torch.float32, device=values.device)
    displaced, misread = dict.fromkeys(read, nothing), dict.fromkeys(errors, nothing)
    seen = torch.zeros_like(values[..., 0])
    asked = evidence.query.float() @ hadamard(keys.shape[-1], keys.device)
    others = (replace(evidence, query=asked, keys=rows).attention(window) for rows in read.values())
    for before, *after in zip(evidence.attention(window), *others, strict=True):
        seen = seen.maximum(before.amax(dim=(2, 3)))
        for bits, weights in zip(read, after, strict=True):
            displaced[bits] = displaced[bits] + _energy((weights - before) @ values[:, :, None])
        for bits, error in errors.items():
            misread[bits] = misread[bits] + _energy(before @ error[:, :, None])
    assert evidence.repetition_peaks is not None
    # The newest queries are few: over all that count, errors are taken to grow as what dropping costs does.
    more = _squares(seen.maximum(evidence.repetition_peaks)) / _squares(seen).clamp(min=1e-9)
    size = _squares((values * evidence.real[..., None]).flatten(2)) / evidence.length[..., 0]
    queries = evidence.length[..., 0].clamp(1, window) * evidence.query.shape[2]
    weight = _ROUNDING * more / size.clamp(min=1e-9) / queries
    losses = [weight * (displaced[format.key_bits] + misread[format.value_bits]) for format in formats]
    dims = keys.shape[-1], values.shape[-1]
    beside = {"scored": evidence.scored, "biased": evidence.biased}
    sizes = [row_bytes(row_parts(*dims, keys.dtype, format, **beside)) for format in formats]
    every = torch.stack([torch.zeros_like(losses[0]), *losses])
    return FormatLoss(every, (evidence.row_bytes, *sizes), evidence.kv_bytes)


def _squares(numbers: Float[Tensor, "b h n"]) -> Float[Tensor, "b h"]:
    return numbers.square().sum(dim=-1)


def _energy(outputs: Float[Tensor, "b h g q e"]) -> Float[Tensor, "b h"]:
    return outputs.square().sum(dim=(2, 3, 4))


def _coded(turned: Float[Tensor, "b h t d"], bits: int) -> Float[Tensor, "b h t d"]:
    """What is read back of rows that were stored as codes."""
    return rounded(turned, bits, turned.shape[-1])
