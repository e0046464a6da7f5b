"""`headwise chat`: turns over one cache, its commands, and what breaks an answer off."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import chatty
import headwise as library
from headwise.cli import chat
from headwise.cli.cache_request import CacheRequest
from headwise.cli.text_generation import Generated, Sampling
from headwise.errors import InputError


def conversation(policy, tokens=6, positions=512, tokenizer=None, **options):
    request = CacheRequest(policy, None, "auto", None, 16)
    return chat.Conversation(
        chatty.model(positions), tokenizer or chatty.tokenizer(), request, Sampling(tokens, 0.0, 0), **options
    )


def test_a_conversation_in_lines(headwise):
    said = (
        b"Who sat?\n\n/report\n/policy snapkv:keep=0.5,window=4\nAnd who else?\n/reset\n/nonsense\n/quit\nnever read\n"
    )
    answer = headwise("chat", "--policy", "full", "--max-new-tokens", 5, stdin=said)
    assert answer.code == 0
    held = re.findall(r"\[([\d,]+) tokens, (.+) held of (.+) \(", answer.err)
    assert len(held) == 2 and int(held[0][0]) < int(held[1][0])
    assert "Full()" in answer.err and "SnapKV(keep=0.5, window=4)" in answer.err
    assert "memory held" in answer.err and "forgotten" in answer.err and "/policy SPEC" in answer.err
    assert len(answer.out.splitlines()) >= 2


def test_a_word_that_cannot_be_does_not_end_it(headwise):
    answer = headwise(
        "chat", "--policy", "full", "--max-new-tokens", 2, stdin=b"/policy snapk\n/policy snapkv\nHello\n"
    )
    assert answer.code == 0 and "error: unknown policy 'snapk'" in answer.err
    # There is no --set here.
    assert "needs parameter keep" in answer.err and "--set" not in answer.err
    assert "tokens, " in answer.err and "Traceback" not in answer.err


def test_each_turn_reads_what_is_new_and_the_whole_is_what_the_template_writes(capsys):
    talk = conversation(library.Full())
    read = []

    def note(module, args, kwargs):
        read.append(kwargs["input_ids"].shape[1])

    talk.model.register_forward_pre_hook(note, with_kwargs=True)
    for line in ("Who sat on the mat?", "Who else?"):
        talk.say(line)
    # Every token was read once, but for the last.
    assert sum(read) == len(talk.ids) - 1 == talk.cache.get_seq_length() and sum(count > 1 for count in read) == 2
    answers = [each["content"] for each in talk.messages if each["role"] == "assistant"]
    text = talk.tokenizer.decode(talk.ids)
    assert text.startswith("<|im_start|>user\nWho sat on the mat?<|im_end|>\n<|im_start|>assistant\n" + answers[0])
    assert text.endswith("<|im_end|>\n<|im_start|>user\nWho else?<|im_end|>\n<|im_start|>assistant\n" + answers[1])
    assert capsys.readouterr().out == "".join(f"{each}\n" for each in answers)


def test_the_answers_are_those_of_generate_over_the_same_ids(capsys):
    talk = conversation(library.SnapKV(keep=0.5, window=4), system="Be brief.")
    for line in ("Who sat?", "Where?"):
        talk.say(line)
    model = chatty.model(512)
    cache = library.HeadwiseCache(model, library.SnapKV(keep=0.5, window=4))
    encoded = chatty.tokenizer().apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who sat?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    ids = encoded
    for _ in range(2):
        # What pads in batches is a token of its own in chats.
        everything = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
        written = model.generate(ids, past_key_values=cache, **everything)[0].tolist()
        assert talk.ids[: len(written)] == written
        ids = torch.tensor([talk.ids[:-6]])
    assert talk.ids == written


def test_without_a_template_it_is_plain_text(capsys):
    talk = conversation(library.Full(), tokenizer=chatty.tokenizer.__wrapped__(chat=False))
    for line in ("The cat", "The dog"):
        talk.say(line)
    assert talk.tokenizer.decode(talk.ids).startswith("The cat")
    assert "\n\nThe dog\n\n" in talk.tokenizer.decode(talk.ids)


def test_an_answer_that_is_broken_off_stays_said_and_the_next_is_right(capsys, monkeypatch):
    talk = conversation(library.Full())
    original, calls = chat.generate_text, []

    def breaking(model, tokenizer, ids, cache, sampling, write):
        if calls:
            return original(model, tokenizer, ids, cache, sampling, write)
        calls.append(ids)

        def broken(piece):
            write(piece)
            raise KeyboardInterrupt

        return original(model, tokenizer, ids, cache, sampling, broken)

    monkeypatch.setattr(chat, "generate_text", breaking)
    talk.say("Who sat on the mat?")
    assert "broken off[nothing held" in capsys.readouterr().err and talk.cache.get_seq_length() == 0
    talk.say("Go on.")
    assert talk.cache.get_seq_length() == len(talk.ids) - 1
    assert talk.tokenizer.decode(talk.ids).count("<|im_start|>user") == 2


def test_an_answer_that_is_empty_or_stands_elsewhere_leaves_the_template_whole(capsys, monkeypatch):
    talk = conversation(library.Full(), system="Who? Be brief.")
    end, answers = chatty.tokenizer().eos_token_id, iter(["", "Who?", "user"])

    def answered(model, tokenizer, ids, cache, sampling, write):
        write(text := next(answers))
        return Generated([*tokenizer(text)["input_ids"], end], text, 0.0, 0.0)

    monkeypatch.setattr(chat, "generate_text", answered)
    for line in ("Who?", "user", "Who?"):
        talk.say(line)
    turns = [("system", "Who? Be brief."), ("user", "Who?"), ("assistant", ""), ("user", "user"), ("assistant", "Who?")]
    turns += [("user", "Who?"), ("assistant", "user")]
    written = "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in turns)
    assert talk.tokenizer.decode(talk.ids) == written.removesuffix("\n")


def test_what_there_is_no_room_for_was_not_said(capsys):
    talk = conversation(library.Full(), positions=64)
    with pytest.raises(InputError, match="room for"):
        talk.say("word " * 80)
    assert talk.messages == [] and talk.ids == []
    talk.say("Hi")
    assert len(talk.messages) == 2


def test_the_end_that_the_model_wrote_is_not_written_again(capsys, monkeypatch):
    talk = conversation(library.Full())
    original, end = chat.generate_text, chatty.tokenizer().eos_token_id

    def ended(*arguments):
        found = original(*arguments)
        return replace(found, token_ids=[*found.token_ids[:-1], end])

    monkeypatch.setattr(chat, "generate_text", ended)
    for line in ("Who?", "Where?"):
        talk.say(line)
    text = talk.tokenizer.decode(talk.ids)
    assert text.count("<|im_end|>") == 4 and "<|im_end|><|im_end|>" not in text
