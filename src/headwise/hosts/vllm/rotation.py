"""Rotation: the rotary embeddings that vLLM made for a model -> the one that policies look through."""

from __future__ import annotations

import torch
from vllm.model_executor.layers import rotary_embedding

from headwise.types import Rotation, Tensor


def known_rotation(head_size: int) -> Rotation | None:
    """Of the model that this process runs; None where it has none, or several."""
    # Made once for every kind of embedding that a model has.
    found = [each for each in rotary_embedding._ROPE_DICT.values() if getattr(each, "head_size", 0) == head_size]
    plain = len(found) == 1 and type(found[0]).forward_native is rotary_embedding.RotaryEmbedding.forward_native
    if not plain or not hasattr(found[0], "cos_sin_cache"):
        return None
    cosine, sine = found[0].cos_sin_cache[:1].float().chunk(2, dim=-1)
    if not torch.allclose(cosine**2 + sine**2, torch.ones_like(cosine), atol=1e-2):
        # It makes vectors longer too.
        return None
    return _Rotation(found[0].cos_sin_cache, found[0].rotary_dim, found[0].is_neox_style)


class _Rotation:
    """By a table of cosines and sines, one row for each position."""

    def __init__(self, table: Tensor, channels: int, halves: bool) -> None:
        self._table, self._channels, self._halves = table, channels, halves

    def __call__(self, vectors: Tensor, positions: Tensor, back: bool) -> Tensor:
        """Turn `[b, h, n, d]` to the positions `[b, n]`, or back from them."""
        rows = self._table.float()[positions.clamp(max=len(self._table) - 1)][:, None]
        cosine, sine = rows.chunk(2, dim=-1)
        sine = -sine if back else sine
        turned, rest = vectors[..., : self._channels].float(), vectors[..., self._channels :]
        one, other = turned.chunk(2, dim=-1) if self._halves else (turned[..., ::2], turned[..., 1::2])
        parts = one * cosine - other * sine, other * cosine + one * sine
        joined = torch.cat(parts, dim=-1) if self._halves else torch.stack(parts, dim=-1).flatten(-2)
        return torch.cat([joined.to(vectors.dtype), rest], dim=-1)
