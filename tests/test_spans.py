"""Spans: where a text is marked, which tokens that is, and files of heads; what is wrong is said."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import headwise
import tiny
from headwise.steer.heads import read_heads, write_heads
from headwise.steer.spans import character_ranges, joined, token_ranges
from models import unchecked_shapes


def bytes_tokenizer(**options):
    """A token for every byte, and for a few words with the space before them; it puts one token before a text."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {"<s>": 0, **{symbol: 1 + i for i, symbol in enumerate(symbols)}}
    backend = Tokenizer(BPE(vocabulary, [], unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", **options)


def marked_tokens(tokenizer, text, *spans, **options):
    encoded, marked = headwise.encode_marked(tokenizer, text, list(spans), **options)
    (ranges,) = marked.spans
    assert marked.columns == encoded["input_ids"].shape[1]
    return [encoded["input_ids"][0, start:stop].tolist() for start, stop in ranges], ranges


def test_a_text_its_occurrences_characters_and_tokens():
    text = "ab cd ab ef ab"
    assert character_ranges(text, "ab") == [(0, 2)]
    assert character_ranges(text, headwise.Span("ab", 2)) == [(6, 8)]
    assert character_ranges(text, headwise.Span("ab", None)) == [(0, 2), (6, 8), (12, 14)]
    assert character_ranges(text, (3, 5)) == [(3, 5)]
    tokenizer = bytes_tokenizer()
    _, ranges = marked_tokens(tokenizer, text, headwise.Span("ab", None), headwise.TokenRange(4, 5), (0, 1))
    # One token stands before the text; what touches is one range, and what is marked twice counts once.
    assert ranges == ((1, 3), (4, 5), (7, 9), (13, 15))


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("abc", "'abc' is not in the text"),
        ("", "an empty text"),
        (headwise.Span("ab", 4), "in the text 3 times, and number 4"),
        ((3, 99), "characters 3 to 99 are marked, and the text has 14"),
        ((4, 4), "characters 4 to 4"),
        (headwise.TokenRange(3, 16), "tokens 3 to 16 are marked, and the text has 15"),
    ],
    ids=str,
)
def test_what_is_not_there(wanted, said):
    with pytest.raises(headwise.InputError, match=said):
        headwise.encode_marked(bytes_tokenizer(), "ab cd ab ef ab", [wanted])


def test_the_nearest_is_named():
    with pytest.raises(headwise.InputError, match="nearest is 'works as a gardener'"):
        character_ranges("Currently Mary works as a gardener.", "Works as a Gardener")


def test_several_bytes_of_a_character_and_a_span_at_the_very_beginning():
    """Half-open: the token that ends where a span starts is not in it, nor one that stands for nothing."""
    text = "é€x 👍y"
    tokens, ranges = marked_tokens(bytes_tokenizer(), text, "€")
    assert ranges == ((3, 6),)
    assert bytes_tokenizer().decode(tokens[0]) == "€"
    assert marked_tokens(bytes_tokenizer(), text, "é")[1] == ((1, 3),)
    assert marked_tokens(bytes_tokenizer(), text, "👍")[1] == ((8, 12),)
    assert token_ranges([(0, 0), (0, 2), (2, 2), (2, 5)], [(0, 3)]) == [(1, 2), (3, 4)]
    with pytest.raises(headwise.InputError, match="are in no token"):
        token_ranges([(0, 0), (0, 2)], [(2, 3)])


def test_texts_of_unequal_lengths_are_padded_on_the_left():
    tokenizer = bytes_tokenizer()
    encoded, marked = headwise.encode_marked(tokenizer, ["abcdef", "xy", "uvw"], [["cd"], [], ["u", "w"]])
    assert encoded["attention_mask"].tolist() == [[1] * 7, [0] * 4 + [1] * 3, [0] * 3 + [1] * 4]
    assert marked == headwise.Marked((((3, 5),), (), ((4, 5), (6, 7))), 7)
    for row, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True):
        assert row[mask.bool()][0] == 0 and (mask.bool()[:-1] <= mask.bool()[1:]).all()


def test_spans_in_a_chat_are_found_in_what_the_template_writes():
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    tokenizer = bytes_tokenizer(chat_template=template)
    chat = [{"role": "user", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    encoded, marked = headwise.encode_marked(tokenizer, chat, ["Be brief."])
    text = "<user>Be brief.\n<user>Who?\n>"
    assert tokenizer.decode(encoded["input_ids"][0]) == text
    assert marked == headwise.Marked((((6, 15),),), len(text))
    _, both = headwise.encode_marked(tokenizer, [chat, chat[1:]], [["Who?"], ["Who?"]], add_generation_prompt=False)
    assert both.spans == (((22, 26),), ((22, 26),))


def test_how_spans_are_given():
    tokenizer = bytes_tokenizer()
    with pytest.raises(headwise.InputError, match="there are 2 texts, and spans for 1"):
        headwise.encode_marked(tokenizer, ["ab", "cd"], [["a"]])
    with pytest.raises(headwise.InputError, match="spans are given as a list"):
        headwise.encode_marked(tokenizer, ["ab"], ["a"])
    with pytest.raises(headwise.InputError, match="tokens 3 to 9 are marked, and there are 8"):
        headwise.Marked((((3, 9),),), 8)
    slow = tiny.tokenizer()
    slow.__class__ = type("Slow", (type(slow),), {"is_fast": False})
    with pytest.raises(headwise.ConfigurationError, match="use a fast tokenizer"):
        headwise.encode_marked(slow, "w9", ["w9"])


def test_ranges_that_touch_or_overlap_are_one():
    assert joined([(5, 7), (1, 3), (3, 4), (6, 9), (6, 7)]) == [(1, 4), (5, 9)]


def test_heads_in_the_published_format(tmp_path):
    """Keys of JSON are text; a list of layers means all of their heads."""
    path = tmp_path / "heads.json"
    write_heads({3: [2, 0], 0: [5]}, path)
    assert json.loads(path.read_text()) == {"0": [5], "3": [0, 2]}
    assert headwise.Steering(path).heads == headwise.Steering({"3": [0, 2, 2], 0: (5,)}).heads == {0: (5,), 3: (0, 2)}
    path.write_text("[4, 1]")
    assert headwise.Steering(str(path)).heads == {1: None, 4: None}


@pytest.mark.parametrize("wrong", [{}, [], {0: []}, {0: 3}, {-1: [0]}, {0: [-1]}, {0: ["a"]}, {"x": [0]}, [True], 7])
def test_what_is_no_heads_is_refused(wrong, tmp_path):
    with pytest.raises(headwise.ConfigurationError, match="head"):
        read_heads(wrong)
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(wrong))
    with pytest.raises(headwise.InputError, match="is no file of heads"):
        headwise.Steering(path)


def test_files_that_are_not_there_or_no_json(tmp_path):
    (tmp_path / "other.json").write_text("{")
    for name in ("none.json", "other.json"):
        with pytest.raises(headwise.InputError, match="is no file of heads"):
            headwise.Steering(tmp_path / name)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: headwise.Steering({0: [0]}, alpha=0), "alpha must be above 0 and at most 1, got 0"),
        (lambda: headwise.Steering({0: [0]}, alpha=1.5), "alpha must be above 0"),
        (lambda: headwise.Steering({0: [0]}, alpha=float("nan")), "alpha must be above 0"),
        (lambda: headwise.Steering({0: [0]}, keep_sinks=-1), "keep_sinks must be a count"),
        (lambda: headwise.Boost({0: [0]}, factor=0.5), "factor must be a number of 1 or more"),
        (lambda: headwise.TargetShare({0: [0]}, share=1.0), "share must be a number above 0 and below 1"),
        (lambda: headwise.Steering({0: [0]}, profile="other"), "profile must be one of steered, plain"),
    ],
)
def test_options_out_of_range(make, said):
    with unchecked_shapes(), pytest.raises(headwise.ConfigurationError, match=said):
        make()
