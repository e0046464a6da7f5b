"""What evidence gives of the newest queries of a prompt, against attention by hand."""

from __future__ import annotations

import pytest
import torch

import headwise
from headwise.types import LogitOptions


@pytest.mark.parametrize("masked", [False, True])
def test_queries_that_are_padding_give_nothing(masked):
    query, keys = torch.randn(2, 2, 3, 4, 8), torch.randn(2, 2, 11, 8)
    # Of the second sequence the last two queries are no tokens, whatever a mask lets them see.
    asked = torch.ones(2, 4, dtype=torch.bool)
    if masked:
        asked[1, 2:] = False
    at = torch.arange(7, 11).expand(2, -1)
    evidence = headwise.Evidence(
        query=query,
        read_keys=lambda: keys,
        read_values=lambda: keys,
        read_spans=lambda: (keys[..., 0], keys[..., 0]),
        value_dim=8,
        asked=asked,
        query_position=at,
        mask=(torch.arange(11) <= at[..., None]) if masked else None,
        options=LogitOptions(0.4),
        position=torch.arange(11).expand(2, 1, -1),
        real=torch.ones(2, 1, 11, dtype=torch.bool),
        length=torch.full((2, 1, 1), 11),
        rotation=None,
        repetition_peaks=None,
    )
    pairs = list(evidence.attention_by_query(4))
    positions, found = (torch.cat(parts, dim=dim) for parts, dim in zip(zip(*pairs, strict=True), (1, 3), strict=True))
    for b in range(2):
        real = asked[b].nonzero().flatten()
        # The newest come last, and before them as many as there are too few.
        less = 4 - len(real)
        assert positions[b, less:].tolist() == at[b, real].tolist()
        assert bool((found[b, :, :, :less] == 0).all())
        logits = 0.4 * torch.einsum("hgqd,htd->hgqt", query[b][:, :, real], keys[b])
        expected = logits.masked_fill(torch.arange(11) > at[b, real][:, None], -torch.inf).softmax(dim=-1)
        torch.testing.assert_close(found[b, :, :, less:], expected)
