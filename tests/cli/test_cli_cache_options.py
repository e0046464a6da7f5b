"""Options about the cache, and the bytes they save."""

from __future__ import annotations

import pytest
from asking import short

from chatty import KV_HEADS, LAYERS, TEXT
from commands import assert_one_line


def test_dtype_halves_the_cache(headwise):
    wide = headwise(*short("--json", "--dtype", "float32", "--policy", "full")).json
    narrow = headwise(*short("--json", "--dtype", "bfloat16", "--policy", "full")).json
    assert wide["memory"]["full_bytes"] == 2 * narrow["memory"]["full_bytes"]


def lengthy(command, *more):
    """Of a prompt that is much longer than the rows that stay exact in any format."""
    return (command, "--raw", "--prompt", f"{TEXT} " * 4, "--policy", "full", "--json", *more)


@pytest.mark.parametrize("command", ["generate", "profile"])
@pytest.mark.parametrize(("bits", "codes"), [("int8", 8 + 8), ("int4", 4 + 4), ("k8v4", 8 + 4)])
def test_bits_shrink_older_rows(headwise, command, bits, codes):
    few = ("--max-new-tokens", 1) if command == "generate" else ()
    wide, narrow = headwise(*lengthy(command, *few)).json, headwise(*lengthy(command, *few, "--bits", bits)).json
    # Key and value have 8 numbers of 4 bytes, or codes with a step and a least number of 2 bytes each; the first 4 rows
    # of a head and the newest 16 stay exact.
    older = LAYERS * KV_HEADS * (wide["prompt_tokens"] - 20)
    saved = wide["memory"]["used_bytes"] - narrow["memory"]["used_bytes"]
    assert older > 0 and saved == older * (2 * 8 * 4 - codes - 2 * 2 * 2)
    assert narrow["memory"]["full_bytes"] == wide["memory"]["full_bytes"]
    assert narrow["kept_ratio"] == wide["kept_ratio"] == 1
    assert narrow["policy"]["name"] == "quantized"
    assert narrow["policy"]["parameters"]["policy"] == "full"


@pytest.mark.parametrize("command", ["generate", "profile"])
def test_rows_can_be_narrower_than_the_model(headwise, command):
    few = ("--max-new-tokens", 1) if command == "generate" else ()
    wide = headwise(*lengthy(command, *few, "--cache-dtype", "float32")).json
    narrow = headwise(*lengthy(command, *few, "--cache-dtype", "float16")).json
    # Of key and value, 8 numbers each, 2 bytes of 4.
    saved = LAYERS * KV_HEADS * wide["prompt_tokens"] * 2 * 8 * 2
    assert wide["memory"]["used_bytes"] - narrow["memory"]["used_bytes"] == saved
    assert narrow["memory"]["full_bytes"] == wide["memory"]["full_bytes"]
    assert headwise(*lengthy(command, *few)).json["memory"] == wide["memory"]


def test_bytes_buy_more_rows_of_less_width(headwise):
    """A row's column takes 4 bytes: of 4 heads, 4 x 68 or 4 x 36 bytes a token."""
    asked = ("profile", "--raw", "--prompt", f"{TEXT} " * 4, "--policy", "snapkv", "--json", "--budget", "8KiB")
    for dtype, tokens in (("float32", 30), ("float16", 56)):
        found = headwise(*asked, "--cache-dtype", dtype).json
        heads = [head["kept_tokens"] for layer in found["layers"] for head in layer["heads"]]
        assert heads == [tokens] * LAYERS * KV_HEADS


@pytest.mark.parametrize("command", ["generate", "profile"])
def test_rows_are_refitted_where_it_is_asked_for(headwise, command):
    few = ("--max-new-tokens", 1) if command == "generate" else ()
    asked = (command, "--raw", "--prompt", f"{TEXT} " * 4, "--policy", "snapkv", "--set", "keep=20", *few)
    plain, matched = headwise(*asked, "--json").json, headwise(*asked, "--match", "--json").json
    assert matched["policy"]["name"] == "match"
    # Twenty rows in each of two heads of two layers, and two bytes for the bias of each.
    assert matched["memory"]["used_bytes"] == plain["memory"]["used_bytes"] + 20 * 2 * 2 * 2
    assert "outputs off by" in headwise(*asked, "--match").err + headwise(*asked, "--match").out
    assert_one_line(headwise(command, "--raw", "--prompt", TEXT, "--policy", "fastgen", "--match"), "goes on evicting")
