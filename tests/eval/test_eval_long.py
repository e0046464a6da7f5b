"""Long: predictions at the end of a long text, and what was held on the way, against feeding it token by token."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import chatty
import commands
from headwise import HeadwiseCache, SnapKV
from headwise.errors import ConfigurationError
from headwise.eval.cache_kinds import FULL_CACHE, PolicyCache
from headwise.eval.long import Long
from headwise.eval.task import Subject

pytestmark = pytest.mark.usefixtures("short_manual")

CONTEXT, STEPS, LAST = 40, 90, 21
LONG = Long(context=CONTEXT, steps=STEPS, passages=2, last=LAST)
POLICY = SnapKV(0.3, window=5, choose_every=6)


@pytest.fixture(scope="module")
def subject():
    return Subject(chatty.model(2048), chatty.tokenizer(), {"evict_every": 4})


def one_by_one(model, ids, cache, look=lambda: None):
    """Log-probabilities after each token behind the context."""
    with torch.inference_mode():
        model(input_ids=ids[:, :CONTEXT], past_key_values=cache)
        rows = []
        for token in ids[:, CONTEXT:-1].split(1, dim=1):
            rows.append(model(input_ids=token, past_key_values=cache).logits[:, -1])
            look()
    return torch.cat(rows).float().log_softmax(dim=-1)


def test_the_end_of_a_text_is_what_counts(subject):
    item = LONG.items(subject.tokenizer)[1]
    ids = torch.tensor([item.data["ids"]])
    cache, held = HeadwiseCache(subject.model, POLICY, evict_every=4), []
    full = one_by_one(subject.model, ids, DynamicCache(config=subject.model.config))[-LAST:]
    ours = one_by_one(
        subject.model, ids, cache, lambda: held.append(cache.report().used_bytes / cache.report().full_bytes)
    )[-LAST:]
    reference = LONG.reference(subject, item)
    torch.testing.assert_close(reference, full, atol=2e-5, rtol=1e-5)
    found = LONG.measure(subject, item, PolicyCache(POLICY), reference)
    kl = (full.exp() * (full - ours)).sum(dim=-1).mean()
    assert found.metrics["kl"] == pytest.approx(float(kl), rel=1e-3) and kl > 1e-3
    assert found.metrics["held"] == pytest.approx(held[-1])
    assert found.kept_ratio == pytest.approx(cache.report().kept_ratio) and found.kept_ratio < 0.4
    # Where several tokens come at once, what is held is looked at less often.
    assert max(held[-64:]) <= found.metrics["most"] <= max(held) < 0.5
    assert found.metrics["step_ms"] > 0


def test_the_full_cache_says_what_it_would_have(subject):
    item = LONG.items(subject.tokenizer)[0]
    found = LONG.measure(subject, item, FULL_CACHE, LONG.reference(subject, item))
    assert found.metrics["kl"] < 1e-5 and found.metrics["top1"] == 1


def test_few_steps_are_all_fed_one_by_one(subject):
    few = Long(context=CONTEXT, steps=5, passages=1, last=1000)
    item = few.items(subject.tokenizer)[0]
    found = few.measure(subject, item, FULL_CACHE, few.reference(subject, item))
    assert found.metrics["kl"] < 1e-5


def test_it_takes_counts():
    with pytest.raises(ConfigurationError, match="last must be a count of 1 or more, got 0"):
        Long(last=0)


def test_long_command(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWISE_MODEL", str(folder))
    sizes = ("--context", 40, "--steps", 50, "--last", 10, "--passages", 1)
    policies = ("--policy", "snapkv:keep=0.25,window=4,choose_every=8", "--policy", "h2o:heavy=0.1,recent=0.1")
    answer = commands.call("eval", "long", "--out", tmp_path / "out", *sizes, *policies, "--json")
    assert answer.code == 0, answer.err
    (summary,) = answer.json["summaries"]
    rows = {row["policy"]: row for row in summary["rows"]}
    assert len(rows) == 5
    for name, size in (("snapkv:keep=0.25,window=4,choose_every=8", 0.25), ("h2o:heavy=0.1,recent=0.1", 0.2)):
        for row in (rows[name], rows[f"random, size of {name}"]):
            assert row["metrics"]["held"]["mean"] == pytest.approx(size, abs=0.2)
            assert row["metrics"]["kl"]["mean"] > 1e-3
