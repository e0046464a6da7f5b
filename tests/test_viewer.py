"""What the page of `headwise inspect` is made of, against the store, plain attention and the tokenizer."""

from __future__ import annotations

import base64
import json
import re
import zlib

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import chatty
import headwise
import tiny
from headwise.errors import ConfigurationError
from headwise.viewer.holdings import Holdings, cells_of, formats_of
from headwise.viewer.page_file import write_page
from headwise.viewer.pieces import pieces
from headwise.viewer.recording import record

POLICY = headwise.Auto(ratio=0.4, window=4, choose_every=8)
HARD = 'Ä 😀 </script><!-- "quoted" & ﷽\n\n' + chatty.TEXT


@pytest.fixture(scope="module")
def recording():
    model, tokenizer = chatty.model(), chatty.tokenizer()
    ids = tokenizer(HARD, return_tensors="pt")["input_ids"]
    return record(model, tokenizer, ids, lambda: headwise.HeadwiseCache(model, POLICY, tokenizer=tokenizer), 20, 4)


def test_what_is_held_is_what_the_store_has():
    model = tiny.llama()
    cache = headwise.HeadwiseCache(model, headwise.Quantized(headwise.H2O(heavy=20, recent=20), 8, 4))
    with torch.no_grad():
        model(tiny.prompt(97), past_key_values=cache)
    found, cells = Holdings.of(cache), cells_of(cache)
    # The last is for heads that do not bear the second.
    assert formats_of(cache) == [("float32", 32), ("K8V4", 6), ("K8V8", 8)]
    assert cells == [(layer, head) for layer in range(3) for head in range(2)]
    for (layer, head), held, size in zip(cells, found.held, found.head_bytes, strict=True):
        store = cache.headwise_layers[layer].core.store
        kinds, total = {}, 0
        for kind, pool in enumerate([store.exact, *(part.pool for part in store.coded)], start=1):
            rows = pool.rows("columns")
            kinds |= dict.fromkeys(rows.columns[0, head][rows.keep[0, head]].tolist(), kind)
            total += int(pool.lengths[0, head]) * pool.row_bytes
        assert held.tolist() == [kinds.get(column, 0) for column in range(97)] and len(set(kinds.values())) == 2
        assert size == total
    assert sum(found.head_bytes) == cache.report().used_bytes
    assert sum(found.full_head_bytes) == found.full_bytes


def test_several_sequences_are_refused():
    model = tiny.llama()
    cache = headwise.HeadwiseCache(model, headwise.Full())
    with pytest.raises(ConfigurationError, match="nothing was read"):
        Holdings.of(cache)
    with torch.no_grad():
        model(tiny.prompt(9, batch=2), past_key_values=cache)
    with pytest.raises(ConfigurationError, match="2 sequences"):
        Holdings.of(cache)


def test_a_model_in_which_nothing_is_compressed_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MistralForCausalLM(MistralConfig(vocab_size=32, num_hidden_layers=1, sliding_window=4, **sizes)).eval()
    cache = headwise.HeadwiseCache(model, headwise.Full())
    with torch.no_grad():
        model(torch.ones(1, 9, dtype=torch.long), past_key_values=cache)
    with pytest.raises(ConfigurationError, match="no heads to show"):
        Holdings.of(cache)


def test_moments_are_the_prompt_some_of_the_answer_and_its_end(recording):
    # The last of twenty tokens is not read.
    assert [moment.seen - recording.prompt for moment in recording.moments] == [0, 7, 14, 19]
    assert len(recording.pieces) == recording.prompt + 19
    assert "".join(recording.pieces[: recording.prompt]) == HARD
    assert all(moment.held.shape == (4, moment.seen) for moment in recording.moments)
    assert len({moment.held[:, : recording.prompt].tobytes() for moment in recording.moments}) > 1


@pytest.fixture(scope="module")
def answered():
    """The same by `generate()`: the tokens that were read, and what is held at the end."""
    model, tokenizer = chatty.model(), chatty.tokenizer()
    cache = headwise.HeadwiseCache(model, POLICY, tokenizer=tokenizer)
    inputs = tokenizer(HARD, return_tensors="pt")
    ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)[:, :-1]
    return ids, Holdings.of(cache)


def test_the_answer_is_that_of_generate(recording, answered):
    ids, held = answered
    assert "".join(recording.pieces) == chatty.tokenizer().decode(ids[0], clean_up_tokenization_spaces=False)
    assert held.held.tolist() == recording.moments[-1].held.tolist()


def test_the_attention_that_is_held_is_that_of_a_full_cache(recording, answered):
    ids, model = answered[0], chatty.model()
    model.set_attn_implementation("eager")
    for moment, shares in zip(recording.moments, recording.attention, strict=True):
        with torch.no_grad():
            maps = model(ids[:, : moment.seen], output_attentions=True).attentions
        # By KV head, of two query heads each, over all queries.
        paid = torch.cat([own[0].unflatten(0, (2, 2)).sum(dim=(1, 2)) for own in maps])
        expected = (paid * torch.tensor(moment.held != 0)).sum(dim=1) / paid.sum(dim=1)
        torch.testing.assert_close(torch.tensor(shares), expected, atol=1e-5, rtol=0)
        assert 0.1 < min(shares) < 1


def test_without_an_answer_there_is_one_moment():
    model, tokenizer = chatty.model(), chatty.tokenizer()
    ids = tokenizer(chatty.TEXT, return_tensors="pt")["input_ids"]
    found = record(model, tokenizer, ids, lambda: headwise.HeadwiseCache(model, headwise.Full()), 0, 9)
    assert [moment.seen for moment in found.moments] == [ids.shape[1]] and found.moments[0].held.all()
    assert found.attention == [pytest.approx([1.0] * 4)]


@pytest.mark.parametrize("text", ["", "a", HARD, "\ufffd\ufffd", "😀" * 9])
def test_pieces_together_are_the_text(text):
    tokenizer = chatty.tokenizer()
    ids = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == text


def test_pieces_of_broken_bytes_are_what_the_tokenizer_makes_of_them():
    tokenizer = chatty.tokenizer()
    ids = tokenizer("😀😀")["input_ids"][1:-1] + tokenizer("abc")["input_ids"] + tokenizer("😀")["input_ids"][:2]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_tokenizer_that_drops_the_first_space_drops_no_other():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "<unk>": 2}, unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    assert pieces(tokenizer, [0, 1, 1, 0]) == ["one", " two", " two", " one"]


def test_the_page_has_everything_and_asks_for_nothing(recording, tmp_path):
    write_page([recording, recording], "a <model>", tmp_path / "heads.html")
    page = (tmp_path / "heads.html").read_text(encoding="utf-8")
    assert "<!--" not in page.replace(r"\u003c", "") and page.count("</script>") == 2
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(|fetch\(|https?:""", page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))
    assert data["model"] == "a <model>" and len(data["panels"]) == 2
    for panel in data["panels"]:
        assert "".join(panel["pieces"]).startswith(HARD) and panel["prompt"] == recording.prompt
        shape = len(panel["moments"]), len(panel["cells"]), len(panel["pieces"])
        held = np.frombuffer(zlib.decompress(base64.b64decode(panel["held"])), np.uint8).reshape(shape)
        held = np.bitwise_xor.accumulate(held, axis=0)
        for own, moment in zip(held, recording.moments, strict=True):
            assert own[:, : moment.seen].tolist() == moment.held.tolist() and not own[:, moment.seen :].any()
