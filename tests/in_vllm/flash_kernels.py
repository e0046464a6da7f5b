"""What FlashAttention's kernels do, in plain torch on a CPU, from the same arguments: strides, tables and all."""

from __future__ import annotations

import torch


def paged_attention(
    *, q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal, block_table,
    softcap=0, s_aux=None, window_size=None, **_,
):  # fmt: skip
    """`flash_attn_varlen_func` over paged rows."""
    assert causal and tuple(window_size or (-1, -1)) == (-1, -1)
    assert max_seqlen_q == int(cu_seqlens_q.diff().max()) and max_seqlen_k >= int(seqused_k.max())
    starts, group = cu_seqlens_q.tolist(), q.shape[1] // k.shape[2]
    for number, length in enumerate(seqused_k.tolist()):
        pages = block_table[number, : -(-length // k.shape[1])].long()
        keys, values = (rows[pages].flatten(0, 1)[:length].float().transpose(0, 1) for rows in (k, v))
        keys, values = (rows.repeat_interleave(group, dim=0) for rows in (keys, values))
        asked = q[starts[number] : starts[number + 1]].float().transpose(0, 1)
        logits = asked @ keys.mT * softmax_scale
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        later = torch.ones(asked.shape[1], length, dtype=torch.bool).triu(length - asked.shape[1] + 1)
        logits = logits.masked_fill(later, -torch.inf)
        if s_aux is not None:
            logits = torch.cat([logits, s_aux[:, None, None].expand(-1, asked.shape[1], 1)], dim=2)
        weights = logits.softmax(dim=-1)[..., :length]
        out[starts[number] : starts[number + 1]] = (weights @ values).transpose(0, 1).to(out.dtype)
    return out


def write_rows(key, value, key_cache, value_cache, slot_mapping, *_):
    """`reshape_and_cache_flash`."""
    size, slots = key_cache.shape[1], slot_mapping.long()
    there = slots >= 0
    at = slots[there] // size, slots[there] % size
    key_cache[at], value_cache[at] = key[: len(slots)][there], value[: len(slots)][there]
