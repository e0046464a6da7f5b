"""Speed in turn, and maps of what every head keeps."""

from __future__ import annotations

import json

import matplotlib.image
import numpy as np
import pytest

import chatty
import models
from headwise import FastGen, HeadwiseCache, Window
from headwise.eval import speed
from headwise.eval.cache_kinds import FULL_CACHE, PolicyCache
from headwise.eval.compare.maps import kept_shares, save_rule_maps, save_share_maps
from headwise.eval.kept import describe_kept, rebuild_report
from headwise.eval.speed import Speed
from headwise.eval.task import Subject

pytestmark = pytest.mark.usefixtures("short_manual")


@pytest.fixture(scope="module")
def subject():
    return Subject(chatty.model(1024), chatty.tokenizer(), {"evict_every": 2})


def test_speed_is_that_of_rounds_in_turn_after_one_to_warm_up(subject, monkeypatch):
    task = Speed(context=30, steps=3, passages=1, rounds=3)
    (item,) = task.items(subject.tokenizer)
    reference = task.reference(subject, item)
    # By round, the first of which does not count: the full cache, and ours.
    taken = {"full": iter([9.0, 2.0, 6.0, 4.0]), "ours": iter([9.0, 1.0, 2.0, 4.0])}
    turns, fed = [], []

    def decode(subject, cache, ids):
        name = "full" if cache is reference.cache else "ours"
        turns.append(name)
        fed.append(ids[0].tolist())
        real(subject, cache, ids)
        return next(taken[name])

    real = speed._decode
    monkeypatch.setattr(speed, "_decode", decode)
    outcome = task.measure(subject, item, PolicyCache(Window(9)), reference)
    assert outcome.metrics == {"tokens_per_second": 2 / 2, "speedup": 2.0}
    assert turns == ["full", "ours", "ours", "full"] * 2
    text = item.data["ids"][30:33]
    assert [token for ids in fed[::2] for token in ids] == (text * 3)[:8]
    assert reference.cache.get_seq_length() == 30
    assert outcome.kept_ratio == pytest.approx(0.3)
    assert outcome.details["kept"]["layers"][0]["kept_tokens"] == [9, 9]


def test_speed_of_a_real_clock(subject):
    task = Speed(context=30, steps=3, passages=1, rounds=2)
    (item,) = task.items(subject.tokenizer)
    outcome = task.measure(subject, item, FULL_CACHE, task.reference(subject, item))
    ours, full = outcome.details["rounds"], outcome.details["full_rounds"]
    assert len(ours) == len(full) == 2
    assert outcome.metrics["tokens_per_second"] == pytest.approx((2 / ours[0] + 2 / ours[1]) / 2)
    assert outcome.metrics["speedup"] == pytest.approx((full[0] / ours[0] + full[1] / ours[1]) / 2)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_is_kept_survives_json(family):
    model = models.shared(family)
    cache = HeadwiseCache(model, FastGen(0.5, ladder=("local", "full")))
    models.generate(model, models.prompt(), cache, max_new_tokens=1)
    report = cache.report()
    told = json.loads(json.dumps(describe_kept(report)))
    again = rebuild_report(told)
    assert describe_kept(again) == told
    for name in ("used_bytes", "allocated_bytes", "full_bytes", "kept_ratio", "rule_counts", "policy", "seen_tokens"):
        assert getattr(again, name) == getattr(report, name), name


def unit(policy, kept, seen=10, **more):
    layers = [{"kept_tokens": tokens, "rules": tokens and [0] * len(tokens)} for tokens in kept]
    sizes = {"used_bytes": 4, "allocated_bytes": 4, "full_bytes": 8}
    told = {"policy": "P()", "seen_tokens": seen, "transcript_bytes": 0, "rungs": ["a"]}
    told["layers"] = [layer | sizes for layer in layers]
    return {"task": "speed", "policy": policy, "kept_ratio": 0.5, "details": {"kept": told}} | more


def test_shares_are_means_over_passages():
    units = [unit("p", [[2, 4], None]), unit("p", [[12, 8], None], seen=20), unit("p", [[9, 9], None], task="other")]
    found = kept_shares({"units": units})
    assert list(found) == ["p"]
    np.testing.assert_allclose(found["p"], [[0.4, 0.4], [np.nan, np.nan]])


def test_maps_show_the_shares_in_their_places(tmp_path):
    lineup = [{"label": f"p at {size}", "series": "p"} for size in (1, 2)]
    units = [unit("p at 1", [[10, 10], [10, 10]], kept_ratio=1.0), unit("p at 2", [[0, 0], [0, 0]], kept_ratio=0.0)]
    told = {"configuration": {"lineup": lineup}, "units": units}
    assert save_share_maps(told, tmp_path / "kept.png")
    image = matplotlib.image.imread(tmp_path / "kept.png")[..., :3]
    # The ends of the scale: dark blue where nothing is kept, yellow where all is; the smaller size comes first.
    columns = [
        np.argwhere(np.abs(image - colour).max(-1) < 0.02)[:, 1] for colour in ((0, 0.135, 0.305), (0.996, 0.91, 0.22))
    ]
    assert len(columns[0]) > 5000
    assert len(columns[1]) > 5000
    assert np.median(columns[0]) < np.median(columns[1])
    assert not save_share_maps({"configuration": {"lineup": []}, "units": []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert save_rule_maps(told, tmp_path) == {}
