"""The check against kvpress: its arithmetic by hand, and the other side with presses made up here."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import headwise
import tiny
from headwise.errors import ConfigurationError, HeadwiseError
from headwise.eval.task import Subject
from oracle import rows_of

TOOLS = Path(__file__).parent.parent / "tools"


def load(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check, other_side = load("check_kvpress"), load("kvpress_kept")


def read(policy, ids):
    """The cache after the prompt."""
    model = tiny.llama(layers=3)
    cache = headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer())
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    return cache


def choice(*heads):
    """`[1, heads, columns]`; x stays."""
    return torch.tensor([[[sign == "x" for sign in head] for head in heads]])


SCORES = torch.tensor([[[9.0, 5, 4, 3.00001, 3, 1], [9, 5, 4, 3, 2, 1]]])


def test_what_is_the_same_is_the_same():
    same = choice("xxx...", "xx.x..")
    found = check.agree(same, same, SCORES, 1)
    assert (found.identical, found.overlap, found.differing, found.by_method, found.farthest) == (1, 1, 0, 0, 0)
    assert found.theirs == found.ours == 3


def test_differences_are_put_down_to_count_noise_or_method():
    # The first head: the fourth and fifth are as good as equal. The second: its last is three quarters below the cut,
    # and the second a quarter above.
    found = check.agree(choice("xxxx..", "xxx..."), choice("xxx.x.", "x.x..x"), SCORES, 1)
    assert (found.differing, found.by_count, found.by_noise, found.by_method) == (4, 0, 2, 2)
    assert found.identical == 0
    assert found.overlap == pytest.approx((3 / 5 + 2 / 4) / 2)
    assert found.farthest == pytest.approx(0.75)


def test_the_tokens_between_two_budgets_are_put_down_to_the_count():
    found = check.agree(choice("xx....", "xx...."), choice("xxxx..", "xxx..x"), SCORES, 1)
    assert (found.theirs, found.ours) == (2, 3.5 + 0.5)
    assert (found.differing, found.by_count, found.by_noise, found.by_method) == (4, 3, 0, 1)


def test_heads_may_share_a_budget():
    # The best five of both: 9, 9, 5, 5, 4 of the first head. With six, the other 4.
    found = check.agree(choice("xxx...", "xx...."), choice("xxx...", "xxx..."), SCORES, 2)
    assert (found.differing, found.by_count) == (1, 1)
    assert check.agree(choice("xxx...", "xx...."), choice("xxx...", "xxx..."), SCORES, 3) == found


def test_kept_of_prompt_is_what_the_cache_keeps():
    ids, policy = tiny.prompt(47, seed=3), headwise.KVzip(0.3)
    found = check.kept_of_prompt(Subject(tiny.llama(layers=3), tiny.tokenizer()), ids, policy)
    sets = [[set(head.nonzero().flatten().tolist()) for head in layer] for layer in found]
    assert sets == [rows_of(layer.core)[0] for layer in read(policy, ids).headwise_layers]


# Presses that keep long values, or mask short ones.


class Longest:
    """Keeps the longest values of each head."""

    def __init__(self, compression_ratio):
        self.compression_ratio = compression_ratio

    def score(self, module, hidden, keys, values, attentions, kwargs):
        return values.norm(dim=-1)

    def compress(self, module, hidden, keys, values, attentions, kwargs):
        best = self.score(module, hidden, keys, values, attentions, kwargs)
        best = best.topk(int(keys.shape[2] * (1 - self.compression_ratio))).indices[..., None]
        return keys.gather(2, best.expand_as(keys[:, :, : best.shape[2]])), values.gather(
            2, best.expand(-1, -1, -1, values.shape[-1])
        )

    @contextlib.contextmanager
    def __call__(self, model):
        def hook(module, given, kwargs, output):
            module.masked_key_indices = None
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            layer.keys, layer.values = self.compress(module, None, layer.keys, layer.values, None, kwargs)

        handles = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
        yield
        for handle in handles:
            handle.remove()


class Masking(Longest):
    """Masks the shortest values of a layer, and never the first of a head."""

    def __init__(self, press):
        self.press = press

    def compress(self, module, hidden, keys, values, attentions, kwargs):
        scores = self.press.score(module, hidden, keys, values, attentions, kwargs)
        scores[:, :, 0] = 1e9
        worst = int(scores[0].numel() * self.press.compression_ratio)
        flat = (-scores.flatten(1)).topk(worst).indices[0]
        columns = keys.shape[2]
        module.masked_key_indices = (torch.zeros_like(flat), flat // columns, flat % columns)
        return keys, values


class Late:
    """Scores when the prompt is over, and believes that two tokens of it are a template's."""

    def __init__(self, compression_ratio):
        self.prefix_length = 2

    @contextlib.contextmanager
    def __call__(self, model):
        yield
        self.score_val = torch.full((3, 1, 2, 20), float(self.prefix_length))
        self.compress_post(model)
        self.score_val = None

    def compress_post(self, model):
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = (torch.tensor([0]), torch.tensor([1]), torch.tensor([7]))


@pytest.fixture
def presses(monkeypatch):
    module = types.ModuleType("kvpress")
    module.Longest, module.Masking, module.Late = Longest, Masking, Late
    monkeypatch.setitem(sys.modules, "kvpress", module)


def lengths(ids):
    """Of the values of every layer and head."""
    full = read(headwise.Full(), ids)
    return torch.cat([layer.core.store.rows().values[0].norm(dim=-1)[None] for layer in full.headwise_layers])


@pytest.mark.usefixtures("presses")
def test_other_side_tells_what_a_press_scored_and_kept():
    ids = tiny.prompt(20, seed=6)
    found = other_side.run(tiny.llama(layers=3), ids, other_side.make_press(["Longest"], 0.25))
    torch.testing.assert_close(found["scores"], lengths(ids))
    best = lengths(ids).topk(5).indices
    assert torch.equal(found["kept"], torch.zeros(3, 2, 20, dtype=torch.bool).scatter(2, best, True))


@pytest.mark.usefixtures("presses")
def test_other_side_reads_masks():
    ids = tiny.prompt(20, seed=6)
    found = other_side.run(tiny.llama(layers=3), ids, other_side.make_press(["Masking", "Longest"], 0.25))
    expected = lengths(ids)
    expected[:, :, 0] = 1e9
    torch.testing.assert_close(found["scores"], expected)
    best = expected.flatten(1).topk(10).indices
    assert torch.equal(found["kept"].flatten(1), torch.zeros(3, 40, dtype=torch.bool).scatter(1, best, True))


@pytest.mark.usefixtures("presses")
def test_other_side_waits_for_scores_and_denies_the_template():
    found = other_side.run(tiny.llama(layers=3), tiny.prompt(20), other_side.make_press(["Late"], 0.5))
    assert found["scores"].shape == (3, 2, 20)
    assert not found["scores"].any()
    assert (~found["kept"]).nonzero().tolist() == [[layer, 1, 7] for layer in range(3)]


@pytest.mark.usefixtures("presses")
def test_other_side_answers_a_request(monkeypatch, tmp_path):
    folder = tmp_path / "model"
    tiny.llama(layers=3).save_pretrained(folder)
    version = other_side.metadata.version
    monkeypatch.setattr(other_side.metadata, "version", lambda name: "9.9" if name == "kvpress" else version(name))
    answer = io.StringIO()
    monkeypatch.setattr(other_side.os, "dup", lambda _: None)
    monkeypatch.setattr(other_side.os, "dup2", lambda *_: None)
    monkeypatch.setattr(other_side.os, "fdopen", lambda *_, **__: answer)
    runs = [{"name": "longest 0.5", "presses": ["Longest"], "share": 0.5}]
    request = {"model": str(folder), "threads": torch.get_num_threads(), "ids": tiny.prompt(20).tolist()}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request | {"folder": str(tmp_path), "runs": runs})))
    other_side.main()
    assert json.loads(answer.getvalue())["kvpress"] == "9.9"
    assert load_file(tmp_path / "longest 0.5.safetensors")["kept"].sum() == 3 * 2 * 10


def test_a_python_without_kvpress_is_told_apart_from_none(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot start"):
        check.ask_kvpress(str(tmp_path / "python"), {})
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(HeadwiseError, match="exit code 3; it needs kvpress"):
        check.ask_kvpress(str(broken), {})


def test_a_policy_that_kvpress_lacks_is_refused():
    with pytest.raises(ConfigurationError, match="nothing of kvpress to check 'h2o' against; there is: snapkv"):
        check.check("python", policies="snapkv,h2o")
