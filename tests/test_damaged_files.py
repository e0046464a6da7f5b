"""Saved caches that are damaged, hostile, or written where they cannot be: an error that says so, nothing else."""

from __future__ import annotations

import json
import random
import resource
import signal
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import models
import tiny
from headwise import H2O, FastGen, Full, HeadwiseCache, InputError, Match, MismatchError, Quantized, SnapKV
from headwise.errors import FileWriteError, HeadwiseError
from headwise.hosts.transformers.saved_checks import checksum

TOKENIZER = tiny.tokenizer()
KINDS = {
    "fastgen": ("llama", FastGen(recovery=0.6)),
    "codes": ("gemma3", Quantized(H2O(heavy=9, recent=8), 8, recent=4)),
    "full": ("llama", Full()),
    "again": ("llama", SnapKV(keep=10, window=4)),
    "matched": ("llama", Match(SnapKV(keep=10, window=4))),
}


def used(name):
    family, policy = KINDS[name]
    model = models.shared(family)
    cache = HeadwiseCache(model, policy, tokenizer=TOKENIZER)
    ids, mask = models.padded_pair()
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache


@pytest.fixture(params=KINDS)
def saved(request, tmp_path):
    used(request.param).save(tmp_path / "cache")
    return request.param, tmp_path / "cache"


def load(name, path):
    family, policy = KINDS[name]
    return HeadwiseCache.load(path, models.shared(family), policy, tokenizer=TOKENIZER)


def test_any_file_that_is_cut_short_is_refused(saved, tmp_path):
    name, path = saved
    whole, cut = path.read_bytes(), tmp_path / "cut"
    for length in [*range(0, 40, 3), *range(40, len(whole), len(whole) // 17), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError):
            load(name, cut)


def test_any_byte_that_is_changed_is_noticed(saved, tmp_path):
    """One in the name of the model or the policy makes it that of another."""
    name, path = saved
    whole, flipped, dice = path.read_bytes(), tmp_path / "flipped", random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [dice.randrange(8) for _ in range(5)] + [dice.randrange(8, header) for _ in range(60)]
    for place in places + [dice.randrange(header, len(whole)) for _ in range(60)]:
        content = bytearray(whole)
        content[place] ^= 1 << dice.randrange(8)
        flipped.write_bytes(content)
        # What pads the header with blanks is no content.
        if place < header and whole[place : place + 1] == b" " and whole[place:header].strip() == b"":
            continue
        with pytest.raises((InputError, MismatchError)):
            load(name, flipped)


def changed(path, change, *, sealed=True):
    """The file with other tensors or metadata, and a checksum that says that it is whole."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = json.loads(metadata["state"])
    change(tensors, state)
    metadata["state"] = json.dumps(state)
    del metadata["checksum"]
    if sealed:
        metadata["checksum"] = checksum(tensors, metadata)
    path = path.with_name("changed")
    save_file(tensors, path, metadata)
    return path


def setting(name, at, value):
    def change(tensors, _):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[at] = value

    return change


def replacing(name, make):
    def change(tensors, _):
        tensors[name] = make(tensors[name]).contiguous()

    return change


def stating(name, value):
    def change(_, state):
        state[name] = value

    return change


def longer(tensors, _):
    tensors["layers.1.lengths"] = tensors["layers.1.lengths"] + 1


def swapped(tensors, _):
    """As many rows in all, of other heads; one has more than there are columns."""
    lengths = tensors["layers.1.lengths"].clone()
    lengths[0, 0] += 1000
    lengths[0, 1] -= 1000
    tensors["layers.1.lengths"] = lengths


def twice(tensors, _):
    columns = tensors["layers.1.columns"].clone()
    columns[1] = columns[0]
    tensors["layers.1.columns"] = columns


HOSTILE = {
    "negative column": setting("layers.1.columns", 0, -1),
    "column beyond": setting("layers.1.columns", 0, 1 << 30),
    "column twice": twice,
    "negative length": setting("layers.1.lengths", 0, -5),
    "huge length": setting("layers.1.lengths", 0, 1 << 62),
    "longer than rows": longer,
    "lengths of others": swapped,
    "negative choice": setting("layers.1.choice", 0, -1),
    "choice beyond": setting("layers.1.choice", 0, 99),
    "huge prompt": setting("layers.1.prompt", 0, 1 << 60),
    "seen": setting("layers.1.counters", 0, 1 << 60),
    "evicted later": setting("layers.1.counters", 1, 1 << 40),
    "NaN": setting("layers.1.keys", 3, torch.nan),
    "NaN in values": setting("layers.1.values", 3, torch.nan),
    "type of keys": replacing("layers.1.keys", lambda keys: keys.int()),
    "type of columns": replacing("layers.1.columns", lambda columns: columns.long()),
    "type of lengths": replacing("layers.1.lengths", lambda lengths: lengths.float()),
    "other channels": replacing("layers.1.keys", lambda keys: keys[:, :-1]),
    "other heads": replacing("layers.1.choice", lambda choice: choice[:, :1]),
    "other batch": replacing("layers.1.prompt", lambda prompt: prompt[:1]),
    "no rows": lambda tensors, _: tensors.pop("layers.1.values"),
    "no layer": lambda tensors, _: [tensors.pop(name) for name in list(tensors) if name.startswith("layers.1.")],
    "unknown": lambda tensors, _: tensors.update({"layers.1.update": torch.zeros(2)}),
    "unknown layer": lambda tensors, _: tensors.update({"layers.77.keys": torch.zeros(2)}),
    "padding of others": replacing("transcript.real", lambda real: ~real),
    "positions": setting("transcript.positions", 30, 1 << 30),
    "columns": stating("columns", 12),
    "negative columns": stating("columns", -1),
    "words": stating("columns", "many"),
    "passes": stating("passes", None),
    "flags": stating("1", {"update": True}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_no_cache_can_hold_is_refused(saved, what):
    name, path = saved
    with pytest.raises(InputError, match=r"is not a sound saved cache: .*"):
        load(name, changed(path, HOSTILE[what]))


def test_what_was_not_changed_is_loaded(saved):
    """Otherwise the cases above would say nothing."""
    name, path = saved
    assert load(name, changed(path, lambda *_: None)).get_seq_length() == models.PROMPT
    with pytest.raises(InputError, match="is damaged"):
        load(name, changed(path, lambda *_: None, sealed=False))


CODES = {
    "format": setting("layers.1.formats", 0, 7),
    "steps": replacing("layers.1.packed0_key_steps", lambda steps: steps[:, :1]),
    "NaN steps": setting("layers.1.packed0_key_steps", 0, torch.nan),
    "both": replacing("layers.1.packed0_columns", lambda columns: torch.zeros_like(columns)),
    "window": setting("layers.0._sliding_window_tensor", 0, 3),
    "stock keys": replacing("layers.0.keys", lambda keys: keys[:, :, :, :3]),
    "stock batch": replacing("layers.0.keys", lambda keys: keys[:1]),
    "stock seen": stating("0", {"is_initialized": True, "cumulative_length": 1 << 40}),
}


@pytest.mark.parametrize("what", CODES)
def test_codes_and_layers_of_transformers_own_are_looked_at_too(what, tmp_path):
    used("codes").save(tmp_path / "cache")
    with pytest.raises(InputError, match=r"is not a sound saved cache: .*"):
        load("codes", changed(tmp_path / "cache", CODES[what]))


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_biases_are_numbers(number, tmp_path):
    used("matched").save(tmp_path / "cache")
    with pytest.raises(InputError, match=r"is not a sound saved cache: .*"):
        load("matched", changed(tmp_path / "cache", setting("layers.1.biases", 5, number)))


NEWEST = {
    "NaN": setting("layers.1.newest_queries", 7, torch.nan),
    "fewer": replacing("layers.1.newest_queries", lambda queries: queries[:, :, :, 1:]),
    "other heads": replacing("layers.1.newest_queries", lambda queries: queries[:, :1]),
    "column beyond": setting("layers.1.newest_columns", 1, 1 << 40),
    "no columns": lambda tensors, _: tensors.pop("layers.1.newest_columns"),
    "of none": lambda tensors, _: tensors.pop("layers.1.newest_queries"),
    "neither": lambda tensors, _: [tensors.pop(f"layers.1.newest_{part}") for part in ("queries", "columns")],
}


@pytest.mark.parametrize("what", NEWEST)
def test_the_newest_queries_are_looked_at(what, tmp_path):
    used("again").save(tmp_path / "cache")
    with pytest.raises(InputError, match=r"is not a sound saved cache: .*"):
        load("again", changed(tmp_path / "cache", NEWEST[what]))


# Where it is written.


def test_a_full_disk_is_said_and_the_old_file_is_left(tmp_path):
    cache, path = used("full"), tmp_path / "cache"
    cache.save(path)
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, hard))
        with pytest.raises(FileWriteError, match=r"cannot write a cache to .*cache") as caught:
            cache.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert isinstance(caught.value, HeadwiseError)
    assert path.read_bytes() == old
    assert [each.name for each in tmp_path.iterdir()] == ["cache"]
    load("full", path)


def test_several_who_write_one_file_at_once_leave_a_whole_one(tmp_path):
    caches = [used("full") for _ in range(4)]
    failed = []

    def write(cache):
        try:
            for _ in range(5):
                cache.save(tmp_path / "cache")
        except HeadwiseError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert [each.name for each in tmp_path.iterdir()] == ["cache"]
    assert load("full", tmp_path / "cache").get_seq_length() == models.PROMPT
