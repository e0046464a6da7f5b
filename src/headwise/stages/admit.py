"""Admit: what is about to be done with a cache -> nothing, or an error where it does not go with what it has seen."""

from __future__ import annotations

import torch

from headwise.errors import InputError
from headwise.stages.token_log import TokenLog
from headwise.types import Bool, Float, Tensor


def check_heads(keys: Float[Tensor, "b h q d"], values: Float[Tensor, "b h q e"], held: tuple[int, ...] | None) -> None:
    """Refuse rows of other sequences or heads than those that are held.

    Args:
        held: sequences, KV heads, and channels of a key and of a value; None before the first pass.

    Raises:
        InputError: saying what differs.
    """
    given = (*keys.shape[:2], keys.shape[-1], values.shape[-1])
    if held is None or given == held:
        return
    check_batch(given[0], held[0])
    raise InputError(
        f"the cache holds {held[1]} KV heads of {held[2]} and {held[3]} channels and this pass brings {given[1]} of "
        f"{given[2]} and {given[3]}; a cache serves one model"
    )


def check_batch(given: int, held: int) -> None:
    """Refuse another number of sequences than is held.

    Raises:
        InputError: saying how many there are.
    """
    if given != held:
        raise InputError(
            f"the cache holds {held} sequences and this pass brings {given}; drop or repeat sequences with "
            "batch_select_indices(), batch_repeat_interleave() or reorder_cache(), or reset() the cache for others"
        )


def check_mask(mask: Bool[Tensor, "b q t"] | None, log: TokenLog) -> None:
    """Refuse a mask that shows columns which were hidden when they were read: their rows were not kept.

    Raises:
        InputError: saying which, or that there is no mask where there must be one.
    """
    real = log.all_real()
    if real is None:
        return
    if mask is None:
        raise InputError(
            f"{int((~real).sum())} columns of the prompt were hidden (padding), and this pass has no mask: pass the "
            "attention_mask of all tokens so far"
        )
    # What a padding token sees is nobody's business.
    own = mask.diagonal(log.columns, -2, -1)
    shown = (mask[:, :, : log.columns] & own[:, :, None]).any(dim=1) & ~real
    if bool(shown.any()):
        sequence, column = (int(index) for index in shown.nonzero()[0])
        raise InputError(
            f"column {column} of sequence {sequence} was hidden when it was read, and the mask of this pass shows it; "
            "what was hidden is not kept: hide it in every pass, or read the prompt again with all that is to be seen"
        )


def check_select(indices: Tensor, held: int) -> None:
    """Refuse a choice of sequences that there is not.

    Args:
        indices: whole numbers, or for each sequence whether it stays.
        held: sequences.

    Raises:
        InputError: saying which.
    """
    if not isinstance(indices, Tensor) or indices.ndim != 1 or indices.is_floating_point() or indices.is_complex():
        given = (
            f"a tensor of {indices.dtype} and shape {tuple(indices.shape)}" if isinstance(indices, Tensor) else indices
        )
        raise InputError(f"sequences are chosen by one row of whole numbers or of True and False, got {given}")
    if indices.dtype == torch.bool:
        if len(indices) != held:
            raise InputError(f"the cache holds {held} sequences, and {len(indices)} are said to stay or to go")
    elif len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < held:
        raise InputError(f"the cache holds sequences 0 to {held - 1}, and {indices.tolist()} are chosen")
