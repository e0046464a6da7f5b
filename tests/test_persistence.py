"""Saving and loading: the loaded cache goes on like the one that was saved; what does not fit is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

import models
import tiny
from headwise import (
    H2O,
    CacheStateError,
    FastGen,
    Full,
    HeadwiseCache,
    InputError,
    MismatchError,
    Random,
    StreamingLLM,
)
from headwise.hosts.transformers import persistence
from models import ALL_SLIDING

TOKENIZER = tiny.tokenizer()
POLICIES = {
    "full": Full(),
    "fastgen": FastGen(recovery=0.6),
    "streamingllm": StreamingLLM(window=7, sinks=3),
    "h2o": H2O(heavy=5, recent=6),
    "random": Random(keep=11, seed=3),
}
FAMILIES = ["llama", "gemma3", "gpt2", "gpt-oss"]


@torch.no_grad()
def logits(model, ids, cache, **options):
    return model(ids, past_key_values=cache, **options).logits


def assert_same_report(mine, its):
    for kept, other in zip(mine.kept_tokens, its.kept_tokens, strict=True):
        assert (kept is None and other is None) or torch.equal(kept, other)
    for rules, other in zip(mine.rules, its.rules, strict=True):
        assert (rules is None and other is None) or rules.tolist() == other.tolist()
    assert mine.used_bytes == its.used_bytes
    for layer, other in zip(mine.layers, its.layers, strict=True):
        # Stock layers may hold a view of something larger until their next token.
        assert layer.kept_tokens is None or layer.full_bytes == other.full_bytes
    assert mine.seen_tokens == its.seen_tokens
    assert mine.sampled == its.sampled


def used_cache(model, policy, **options):
    """A cache that has seen a left-padded batch and three more tokens, and the mask so far."""
    ids, mask = models.padded_pair()
    cache = HeadwiseCache(model, policy, tokenizer=TOKENIZER, **options)
    positions = mask.cumsum(dim=1).sub(1).clamp(min=0)
    logits(model, ids, cache, attention_mask=mask, position_ids=positions)
    for token in range(3):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        at = mask.sum(dim=1, keepdim=True) - 1
        logits(model, ids[:, -1 - token :][:, :1], cache, attention_mask=mask, position_ids=at)
    return cache, mask


@pytest.mark.parametrize("way", ["file", "copy"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_cache_goes_on_like_the_one_that_was_saved(family, name, way, tmp_path):
    model, policy = models.shared(family), POLICIES[name]
    cache, mask = used_cache(model, policy, page_size=5)
    before = cache.report()
    if way == "file":
        cache.save(tmp_path / "new" / "cache.safetensors")
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["cache.safetensors"]
        loaded = HeadwiseCache.load(
            tmp_path / "new" / "cache.safetensors", model, policy, tokenizer=TOKENIZER, page_size=3
        )
    else:
        loaded = copy.deepcopy(cache)
    assert_same_report(cache.report(), before)
    assert_same_report(loaded.report(), before)
    for step in range(13):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        at = mask.sum(dim=1, keepdim=True) - 1
        ids = torch.tensor([[11 + step], [4 + step % 3]])
        mine = logits(model, ids, cache, attention_mask=mask, position_ids=at)
        its = logits(model, ids, loaded, attention_mask=mask, position_ids=at)
        torch.testing.assert_close(its, mine, rtol=1e-5, atol=1e-5)
        if step == 5:
            for each in (cache, loaded):
                each.reorder_cache(torch.tensor([1, 0]))
            mask = mask[[1, 0]]
    assert_same_report(loaded.report(), cache.report())


@pytest.mark.parametrize("family", [*FAMILIES, ALL_SLIDING])
def test_a_conversation_goes_on_from_a_file(family, tmp_path):
    model = models.shared(family)
    policy = Full() if family == ALL_SLIDING else POLICIES["fastgen"]
    cache = HeadwiseCache(model, policy, tokenizer=TOKENIZER)
    ids = models.generate(model, models.prompt(), cache, max_new_tokens=7)
    ids = torch.cat([ids, models.prompt(models.TURN)], dim=1)
    cache.save(tmp_path / "cache")
    expected = models.generate(model, ids, cache)
    loaded = HeadwiseCache.load(tmp_path / "cache", model, policy, tokenizer=TOKENIZER)
    assert torch.equal(models.generate(model, ids, loaded), expected)
    assert_same_report(loaded.report(), cache.report())


def test_a_marker_may_be_completed_after_loading(tmp_path):
    model = models.shared("llama")
    policy = FastGen(recovery=0.0, local=4, ladder=("special+local", "full"))
    options = {"tokenizer": TOKENIZER, "markers": ["w31 w47 w53"], "evict_every": 1}
    cache = HeadwiseCache(model, policy, **options)
    logits(model, torch.tensor([[0, 12, 13, 14, 31]]), cache)
    cache.save(tmp_path / "cache")
    loaded = HeadwiseCache.load(tmp_path / "cache", model, policy, **options)
    for token in (47, 53, 15, 16, 17, 18):
        for each in (cache, loaded):
            logits(model, torch.tensor([[token]]), each)
    assert cache.report().kept_tokens[0].tolist() == [[8, 8]]
    assert_same_report(loaded.report(), cache.report())


def test_nothing_evicted_can_still_be_cropped_after_loading(tmp_path):
    model = models.shared("llama")
    cache = HeadwiseCache(model, Full())
    logits(model, models.prompt(13), cache)
    cache.save(tmp_path / "cache")
    loaded = HeadwiseCache.load(tmp_path / "cache", model, Full())
    assert loaded.is_croppable
    for each in (cache, loaded):
        each.crop(-5)
    assert loaded.get_seq_length() == 8
    mine, its = (logits(model, models.prompt(3), each) for each in (cache, loaded))
    torch.testing.assert_close(its, mine)


def test_a_fresh_cache_can_be_saved(tmp_path):
    model = models.shared("gemma3")
    HeadwiseCache(model, Full()).save(tmp_path / "cache")
    loaded = HeadwiseCache.load(tmp_path / "cache", model, Full())
    assert loaded.get_seq_length() == 0
    ids = models.prompt(9)
    torch.testing.assert_close(logits(model, ids, loaded), logits(model, ids, None))


def test_a_file_holds_kept_rows_and_nothing_else(tmp_path):
    model = models.shared("llama")
    cache = HeadwiseCache(model, StreamingLLM(window=7, sinks=3), page_size=512)
    logits(model, models.prompt(211), cache)
    cache.save(tmp_path / "cache")
    size = (tmp_path / "cache").stat().st_size
    assert cache.report().used_bytes < size < cache.report().used_bytes + 8_000
    assert size < cache.report().full_bytes / 5


# What is refused.


@pytest.fixture
def saved(tmp_path):
    model = models.shared("llama")
    used_cache(model, POLICIES["fastgen"])[0].save(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "policy",
    [Full(), FastGen(recovery=0.7), FastGen(recovery=0.6, local=0.2), StreamingLLM(window=7, sinks=3)],
    ids=str,
)
def test_another_policy_is_refused(saved, policy):
    with pytest.raises(MismatchError, match=r"saved with FastGen\(recovery=0.6.*not with"):
        HeadwiseCache.load(saved, models.shared("llama"), policy, tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    "make",
    [lambda: models.build("llama", seed=1), lambda: models.build("llama").bfloat16(), lambda: models.build("qwen2")],
    ids=["weights", "dtype", "family"],
)
def test_another_model_is_refused(saved, make):
    model = make()
    with pytest.raises(MismatchError, match="saved with another LlamaForCausalLM"):
        HeadwiseCache.load(saved, model, POLICIES["fastgen"], tokenizer=TOKENIZER)


def test_a_further_trained_weight_makes_another_model(saved):
    model = models.build("llama")
    HeadwiseCache.load(saved, model, POLICIES["fastgen"], tokenizer=TOKENIZER)
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight += 1e-6
    with pytest.raises(MismatchError):
        HeadwiseCache.load(saved, model, POLICIES["fastgen"], tokenizer=TOKENIZER)


def foreign(path):
    save_file({"keys": torch.zeros(3)}, path)


def older(path):
    save_file({"keys": torch.zeros(3)}, path, {"format": "headwise-cache-0"})


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no saved cache at"),
        (lambda path: path.mkdir(), "no saved cache at"),
        (lambda path: path.write_bytes(b""), "not a safetensors file"),
        (lambda path: path.write_bytes(b"not a cache " * 50), "not a safetensors file"),
        (lambda path: path.write_bytes((path.parent / "cache").read_bytes()[:-40]), "not a safetensors file"),
        (foreign, "is not a cache saved by"),
        (older, "is not a cache saved by"),
    ],
    ids=["missing", "folder", "empty", "garbage", "cut", "foreign", "older"],
)
def test_a_file_that_is_no_saved_cache_is_refused(saved, write, message):
    path = saved.with_name("other")
    write(path)
    with pytest.raises(InputError, match=message):
        HeadwiseCache.load(path, models.shared("llama"), POLICIES["fastgen"], tokenizer=TOKENIZER)


def test_a_refused_file_leaves_the_model_as_it_was(saved):
    model = models.build("llama")
    with pytest.raises(MismatchError):
        HeadwiseCache.load(saved, model, Full())
    assert model.config._attn_implementation == "eager"
    assert "forward" not in vars(model)


def test_half_a_prompt_cannot_be_saved(tmp_path):
    model = models.shared("llama")
    cache = HeadwiseCache(model, POLICIES["streamingllm"], prompt_tokens=13)
    logits(model, models.prompt(7), cache)
    with pytest.raises(CacheStateError, match="cannot save before the whole prompt is in"):
        cache.save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []
    logits(model, models.prompt(6), cache)
    cache.save(tmp_path / "cache")


def test_saving_accepts_the_tokens_of_the_last_pass(tmp_path):
    """Assisted decoding leaves recording on; a later plain turn then has a last pass that no crop will come for."""
    model = models.shared("llama")
    cache = HeadwiseCache(model, POLICIES["streamingllm"])
    cache.activate_past_recording()
    logits(model, models.prompt(29), cache)
    cache.save(tmp_path / "cache")
    loaded = HeadwiseCache.load(tmp_path / "cache", model, POLICIES["streamingllm"])
    for one in (cache, loaded):
        assert one.get_seq_length() == 29
        assert all((kept == 10).all() for kept in one.report().kept_tokens)
        with pytest.raises(CacheStateError):
            one.crop(-1)


def test_other_markers_are_refused(saved):
    with pytest.raises(MismatchError, match="another tokenizer or other markers"):
        HeadwiseCache.load(saved, models.shared("llama"), POLICIES["fastgen"], tokenizer=TOKENIZER, markers=["w9 w10"])


# Saving that fails.


@pytest.mark.parametrize("there", [False, True], ids=["new", "over-an-old-file"])
def test_saving_that_fails_leaves_nothing_half_written(tmp_path, monkeypatch, there):
    model = models.shared("llama")
    cache, _ = used_cache(model, POLICIES["fastgen"])
    path = tmp_path / "cache"
    if there:
        cache.save(path)
    old = path.read_bytes() if there else None

    def disk_full(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(persistence, "save_file", disk_full)
    with pytest.raises(OSError, match="no space left"):
        cache.save(path)
    assert [each.name for each in tmp_path.iterdir()] == (["cache"] if there else [])
    if there:
        assert path.read_bytes() == old


def test_saving_where_no_file_can_be_leaves_the_cache_usable(tmp_path):
    model = models.shared("llama")
    cache, mask = used_cache(model, POLICIES["fastgen"])
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "cache", tmp_path / "folder"):
        with pytest.raises(OSError, match=str(tmp_path)):
            cache.save(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
    logits(model, torch.tensor([[11], [12]]), cache, attention_mask=mask)
