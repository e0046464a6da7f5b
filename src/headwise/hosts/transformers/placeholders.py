"""Placeholders: the configuration of a model -> the ids in the place of which it sees images and videos, or hears."""

from __future__ import annotations

from typing import Any

import torch

from headwise.errors import InputError
from headwise.hosts.transformers.positions import planned
from headwise.policies.base import Policy
from headwise.types import Int, Tensor

# What transformers' configurations call them.
_NAMES = tuple(f"{medium}_token_{key}" for medium in ("image", "video", "audio") for key in ("id", "index"))


def placeholders(config: Any) -> frozenset[int]:
    """Ids that are replaced by what the model sees or hears; none for a model of text alone.

    The marks around an image are none of them: there is one of each, and they are special tokens like others.
    """
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    found = {getattr(part, name, None) for part in parts if part is not None for name in _NAMES}
    return frozenset(token for token in found if isinstance(token, int) and token >= 0)


def check_repeatable(cache: Any, input_ids: Int[Tensor, "b q"] | None) -> None:
    """Refuse a part of a prompt that the model of a cache cannot repeat, because it is not made of ids alone.

    Raises:
        InputError: saying how much of it.
    """
    policy: Policy = cache.policy.chooser
    if not policy.needs_repetition or input_ids is None or planned(cache):
        return
    found = placeholders(cache.model.config)
    count = int(torch.isin(input_ids, torch.tensor(sorted(found), device=input_ids.device)).sum())
    if count:
        raise InputError(
            f"{type(policy).__name__} lets the model repeat its prompt, which it can do with text alone, and {count} "
            "of these tokens stand for images, videos or sounds; take a policy that repeats nothing, such as SnapKV"
        )


def check_marked(cache: Any, input_ids: Int[Tensor, "b q"] | None) -> None:
    """Refuse marks on what stands for an image, a video or a sound: emphasis is of text.

    Raises:
        InputError: saying where.
    """
    marks = cache.token_log.marks
    # A cache may outlive its model, and then goes on.
    if not marks.announced or input_ids is None or not (found := placeholders(cache.model.config)):
        return
    seen = cache.token_log.columns
    media = torch.isin(input_ids, torch.tensor(sorted(found), device=input_ids.device)).cpu()
    marked = media & marks.coming(seen, *input_ids.shape)
    if bool(marked.any()):
        raise InputError(
            f"token {seen + int(marked.any(dim=0).int().argmax())} is marked and stands for an image, a video or a "
            "sound; mark text beside it"
        )
