"""Text as it streams: pieces are whole characters, and together they are the text."""

from __future__ import annotations

import torch

from headwise.cli.streaming import TextStream


def test_pieces_of_a_stream_are_whole_characters(tokenizer):
    ids = tokenizer("naïve café ☕ done")["input_ids"]
    pieces = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt, which is no output
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == stream.text == "naïve café ☕ done"
    assert len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_text_that_ends_inside_a_character_is_passed_on_at_the_end(tokenizer):
    ids = tokenizer("a ☕")["input_ids"][:-1]
    pieces = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[1]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == stream.text
    assert stream.text.endswith("\ufffd")
