"""One layer by itself, as a host drives it: what it refuses, so that a new host cannot go wrong in silence."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakMethod

import pytest
import torch

import headwise
from headwise.kernels.backends import choose
from headwise.stages.config import CacheConfig, LayerConfig
from headwise.stages.layer import LayerCache
from headwise.stages.token_log import TokenLog
from headwise.stages.whole_model import WholeModel
from headwise.steer.steering import LayerSteering
from headwise.types import LogitOptions

KERNELS = choose("reference", torch.device("cpu"))


class Repeater:
    """Stands for the host's model, which a policy that looks at keys alone does not ask."""

    def repeat(self, ids, first):
        raise AssertionError("nothing is to be repeated")


def attend(core, count):
    return core.attend(
        torch.randn(1, 2, 1, count, 8),
        torch.randn(1, 2, count, 8),
        torch.randn(1, 2, count, 8),
        None,
        LogitOptions(1.0),
    )


def cores_of(policy):
    log = TokenLog("kind" in policy.facts)
    return [LayerCache(LayerConfig(index, policy, CacheConfig(KERNELS, layers=2)), log) for index in range(2)]


@dataclass(frozen=True)
class NormOverAllLayers(headwise.KeyNorm):
    """Chooses like `KeyNorm`, but for all layers at once."""

    @property
    def needs_all_layers(self):
        return True


def test_a_host_that_forgets_to_compact_is_told_so():
    cores = cores_of(NormOverAllLayers(keep=5))
    for core in cores:
        attend(core, 9)
    with pytest.raises(headwise.CacheStateError, match=r"calls WholeModel\.choose\(\)"):
        attend(cores[0], 1)


def test_a_host_that_compacts_goes_on():
    policy, repeater = NormOverAllLayers(keep=5), Repeater()
    cores = cores_of(policy)
    whole = WholeModel(policy, cores, WeakMethod(repeater.repeat))
    for core in cores:
        attend(core, 9)
    whole.choose()
    for core in cores:
        attend(core, 1)
    assert [core.kept_tokens.tolist() for core in cores] == [[[6, 6]]] * 2


def test_mass_that_came_with_tokens_taken_back_is_found_anew():
    """It came with the attention of all of them, and columns that go must not have given any."""
    policy, kept = headwise.H2O(0.5, 0.25), slice(6)
    query, keys, values = torch.randn(1, 2, 3, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    found = []
    for taken_back in (3, 0):
        config = CacheConfig(KERNELS, prompt_columns=20)
        core = LayerCache(LayerConfig(0, policy, config), TokenLog("kind" in policy.facts))
        core.recording = True
        some = slice(None) if taken_back else kept
        core.attend(query[:, :, :, some], keys[:, :, some], values[:, :, some], None, LogitOptions(0.3))
        core.take_back(taken_back)
        core.accept()
        found.append(core.prompt.observations.mass.profile)
    torch.testing.assert_close(found[0].score, found[1].score)
    assert found[0].rows_read == found[1].rows_read == 6


def test_policies_look_at_steered_attention_only_where_they_are_to():
    """What comes with the attention of a prompt is of the attention that is steered."""
    query, keys, values = torch.randn(1, 2, 3, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    scores, policy = {}, headwise.H2O(0.5, 0.25)
    for profiled in (None, False, True):
        steering = None if profiled is None else LayerSteering(torch.full((2, 3), 2.0), None, profiled)
        log = TokenLog("kind" in policy.facts)
        log.marks.values = torch.tensor([[0.0, 1.0, 1.0, *[0.0] * 6]])
        config = CacheConfig(KERNELS, prompt_columns=20)
        core = LayerCache(LayerConfig(0, policy, config, steering=steering), log)
        core.attend(query, keys, values, None, LogitOptions(0.3))
        core.accept()
        scores[profiled] = core.prompt.observations.mass.profile.score
    torch.testing.assert_close(scores[False], scores[None])
    assert (scores[True][..., 1:3] > scores[None][..., 1:3] + 0.1).all()


@pytest.mark.parametrize("policy", [headwise.PeakAttention(keep=0.5, window=4), headwise.Auto(ratio=0.5, window=4)])
def test_a_layer_that_waits_for_the_others_holds_its_rows_and_few_queries(policy):
    """In one pass all queries are there, and would take more than the rows where groups are large."""
    core, count, group = cores_of(policy)[0], 600, 12
    rows = torch.randn(1, 2, count, 8), torch.randn(1, 2, count, 8)
    query = torch.randn(1, 2, group, count, 8)
    core.attend(query, *rows, None, LogitOptions(1.0))
    core.accept()
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in core.prompt.tensors()}
    assert sum(held.values()) <= sum(tensor.nbytes for tensor in rows) + query.nbytes // 6
    assert torch.equal(core.prompt.observations.asked.query[:, :, :, -4:], query[:, :, :, -4:])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"page_size": 0}, "page_size must be a count of 1 or more, got 0"),
        ({"page_size": True}, "page_size must be a count"),
        ({"evict_every": 2.0}, "evict_every must be a count of 1 or more, got 2.0"),
        ({"dtype": torch.int8}, "cache_dtype must be one of torch.float32"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_whoever_the_host_is(options, complaint):
    with pytest.raises(headwise.ConfigurationError, match=complaint):
        CacheConfig(KERNELS, **options)
