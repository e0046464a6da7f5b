"""Requests that are told what to write, as they come, go and move in a batch."""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from headwise.hosts.vllm.forced import Forced


def told(*ids):
    return SamplingParams(extra_args={"forced_ids": list(ids)} if ids else None)


def wanted(forced):
    """The only token that is left to each row; None where all are."""
    found = forced.apply(torch.zeros(4, 9))
    return [int(row.argmax()) if int(row.isfinite().sum()) == 1 else None for row in found]


def test_each_writes_its_own():
    forced, written = Forced(None, None, False), [[], [], []]
    forced.update_state(None)
    added = [(0, told(5, 6), [1], written[0]), (1, told(), [1], []), (2, told(7), [1], written[2])]
    forced.update_state(BatchUpdate(3, [], added, []))
    assert wanted(forced) == [5, None, 7, None]
    written[0].append(5)
    written[2].append(7)
    assert wanted(forced) == [6, None, None, None]
    forced.update_state(BatchUpdate(3, [], [], [(0, 1, MoveDirectionality.SWAP)]))
    assert wanted(forced) == [None, 6, None, None]
    forced.update_state(BatchUpdate(4, [], [(3, told(8), [1], [])], [(3, 1, MoveDirectionality.SWAP)]))
    assert wanted(forced) == [None, 8, None, 6]
    # The last takes the place of one that is gone; another comes where there was one.
    forced.update_state(BatchUpdate(3, [1], [], [(3, 1, MoveDirectionality.UNIDIRECTIONAL)]))
    assert wanted(forced) == [None, 6, None, None]
    forced.update_state(BatchUpdate(3, [], [(1, told(), [1], [])], []))
    assert wanted(forced) == [None] * 4
    # Beyond the vocabulary there is nothing to be written.
    forced.update_state(BatchUpdate(3, [], [(0, told(10**6), [1], [])], []))
    assert wanted(forced) == [8, None, None, None]


@pytest.mark.parametrize("ids", ["7", [1, -2], [1.5], {"a": 1}])
def test_what_is_no_list_of_ids_is_refused(ids):
    with pytest.raises(ValueError, match="forced_ids must be a list of token ids"):
        Forced.validate_params(SamplingParams(extra_args={"forced_ids": ids}))
    Forced.validate_params(SamplingParams(extra_args={"other": ids}))
