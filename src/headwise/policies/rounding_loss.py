"""Rounding loss: how far the numbers of rows lie apart -> what storing each row in fewer bits loses of its worth."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import torch

from headwise.policies.evidence import Evidence
from headwise.quant.formats import RowFormat
from headwise.types import Float, Tensor

# What a rounding error counts, beside an error as large from dropping a token. Rounding is different for each query,
# head and layer, and averages out; what is dropped is missed by just the queries that need it, in full. The weight was
# found by trying, on other texts than those of the published figures (docs/quantization.md).
_ROUNDING = 0.005


def rounding_loss(evidence: Evidence, formats: Sequence[RowFormat]) -> Float[Tensor, "formats b h t"]:
    """The square of what rounding is expected to move an output by, as a share of what dropping the row would.

    A code is off by up to half a step, all errors being equally likely: a twelfth of the step's square. Errors of a
    key move its logit by their product with the query, and the output by as much of the row's share in it; errors of
    a value move the output by themselves. Rows that are codes are rotated, so that no channel stands out; how large
    values are is then known from how far their numbers lie apart, as of numbers that are normally distributed.
    """
    keys, values = (span.square() for span in evidence.spans)
    counted = evidence.asked[:, None, None, :, None]
    asked = (evidence.query.float().square() * counted).sum(dim=(2, 3, 4))
    asked = asked / (counted.sum(dim=(2, 3, 4)) * evidence.query.shape[2]).clamp(min=1)
    displaced = keys * (asked * evidence.options.scaling**2)[..., None]
    count = evidence.real.expand(values.shape).sum(dim=-1, keepdim=True).clamp(min=1)
    size = values.where(evidence.real, 0).sum(dim=-1, keepdim=True) / count / _normal_range(evidence.value_dim) ** 2
    misread = values / size.clamp(min=1e-30)

    def noise(per_step: Tensor, bits: int) -> Tensor:
        return per_step / float(2**bits - 1) ** 2 / 12

    lost: list[Tensor] = [noise(displaced, f.key_bits) + noise(misread, f.value_bits) for f in formats]
    shares: Tensor = _ROUNDING * torch.stack(lost)
    return shares.clamp(max=1)


def _normal_range(count: int) -> float:
    """How far so many normally distributed numbers lie apart (Blom 1958, the expected largest of them)."""
    return 2 * NormalDist().inv_cdf((count - 0.375) / (count + 0.25))
