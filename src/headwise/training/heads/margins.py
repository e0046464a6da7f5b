"""Margins: prompts with two answers, and a model -> by how much each head, steered alone, prefers the marked one.

The margin of a prompt is the logarithm of what the wanted answer's first own token is times as likely as the other's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwise.hosts.transformers.marked import encode_marked
from headwise.hosts.transformers.probe import Probe
from headwise.measure.chat import Prompt, write_answer, write_prompt
from headwise.measure.contrasts import Contrast, first_answers
from headwise.steer.spans import Marked
from headwise.steer.steering import Steering
from headwise.types import Float, Int, Tensor

# Tokens of all sequences that are computed at a time, about.
_TOKENS = 4096


@dataclass(frozen=True)
class Batch:
    """Prompts that are read together.

    Attributes:
        ids, mask: padded on the left; what both answers begin with is part of them.
        marks: what is added to the logits of every column.
        answers: first own token of the wanted answer, and of the other.
        before: columns before the first that is marked in any of them.
    """

    ids: Int[Tensor, "n t"]
    mask: Int[Tensor, "n t"]
    marks: Float[Tensor, "n t"]
    answers: Int[Tensor, "n 2"]
    before: int

    def repeated(self, times: int) -> Batch:
        """Every prompt so many times behind one another."""
        ids, mask, marks, answers = (
            each.repeat_interleave(times, dim=0) for each in (self.ids, self.mask, self.marks, self.answers)
        )
        return Batch(ids, mask, marks, answers, self.before)

    def margins(self, logits: Float[Tensor, "n vocabulary"]) -> Float[Tensor, " n"]:
        """Of the answers to the prompts."""
        own = logits.gather(1, self.answers)
        return own[:, 0] - own[:, 1]


def batches(
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Contrast],
    steering: Steering,
    copies: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Prompts of about equal lengths, as many as go together when each is read so many times at once."""
    encoded = sorted((_encoded(tokenizer, sample) for sample in samples), key=lambda each: len(each[0]))
    while encoded:
        longest, count = len(encoded[0][0]), 0
        while count < len(encoded) and (count + 1) * copies * max(longest, len(encoded[count][0])) <= _TOKENS:
            longest, count = max(longest, len(encoded[count][0])), count + 1
        part, encoded = encoded[: max(1, count)], encoded[max(1, count) :]
        yield _padded(part, steering, device)


# Ids of a prompt, ranges of them that are marked, and the two tokens that may follow.
_Encoded = tuple[list[int], tuple[tuple[int, int], ...], tuple[int, int]]


def _encoded(tokenizer: PreTrainedTokenizerBase, sample: Contrast) -> _Encoded:
    """Ids of a prompt and what both answers begin with, what is marked, and the two tokens that may follow."""
    prompt = write_prompt(tokenizer, sample.text) if sample.chat else Prompt(sample.text)
    spans = prompt.ranges(sample.text, sample.spans)
    inputs, marked = encode_marked(tokenizer, prompt.text, spans, add_special_tokens=prompt.special)
    answers = (sample.wanted, sample.unwanted)
    texts = [write_answer(tokenizer, each) for each in answers] if sample.chat else answers
    wanted, unwanted = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in texts)
    common, one, other = first_answers(wanted, unwanted)
    return [*inputs["input_ids"][0].tolist(), *common], marked.spans[0], (one, other)


def _padded(part: Sequence[_Encoded], steering: Steering, device: torch.device) -> Batch:
    longest = max(len(ids) for ids, _, _ in part)
    ids = torch.zeros(len(part), longest, dtype=torch.long, device="cpu")
    mask, marked = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (own, spans, _) in enumerate(part):
        before = longest - len(own)
        ids[row, before:], mask[row, before:] = torch.tensor(own, device="cpu"), 1
        for start, stop in Marked((spans,), len(own)).spans[0]:
            marked[row, before + start : before + stop] = True
    marks = steering.marks(marked, mask.bool() & ~marked)
    answers = torch.tensor([answer for _, _, answer in part], dtype=torch.long, device="cpu")
    first = int(marked.any(dim=0).int().argmax())
    return Batch(ids.to(device), mask.to(device), marks.to(device), answers.to(device), first)


@dataclass
class Margins:
    """Sums over the prompts of a task.

    Attributes:
        count: of prompts.
        plain: sum of the margins without any steering.
        heads: the same for each head, by layer.
    """

    count: int
    plain: float
    heads: dict[int, list[float]]

    def __add__(self, other: Margins) -> Margins:
        heads = {
            layer: [a + b for a, b in zip(own, other.heads[layer], strict=True)] for layer, own in self.heads.items()
        }
        return Margins(self.count + other.count, self.plain + other.plain, heads)


def measure_heads(model: PreTrainedModel, batch: Batch, layers: Sequence[int], heads: int) -> Margins:
    """Every head of those layers steered alone, for the prompts of a batch."""
    wide = batch.repeated(heads)
    probe = Probe(model, wide.ids, wide.mask, wide.before)
    plain = wide.margins(probe.read())[::heads]
    gates = torch.eye(heads, dtype=torch.float32, device=wide.ids.device).repeat(len(batch.ids), 1)
    found = {}
    for layer in layers:
        margins = wide.margins(probe.answers(layer, gates, wide.marks))
        found[layer] = margins.view(-1, heads).double().sum(dim=0).tolist()
    return Margins(len(batch.ids), float(plain.double().sum()), found)


def measure_layers(model: PreTrainedModel, batch: Batch, layers: Sequence[int], heads: int) -> Margins:
    """All heads of each of those layers steered together; one number for a layer."""
    probe = Probe(model, batch.ids, batch.mask, batch.before)
    plain = batch.margins(probe.read())
    gates = torch.ones(len(batch.ids), heads, dtype=torch.float32, device=batch.ids.device)
    found = {}
    for layer in layers:
        margins = batch.margins(probe.answers(layer, gates, batch.marks))
        found[layer] = [float(margins.double().sum())]
    return Margins(len(batch.ids), float(plain.double().sum()), found)


def estimated_seconds(model: PreTrainedModel, parts: Sequence[Batch], layers: Sequence[int], heads: int) -> float:
    """About how long `measure_heads` will take for all of them: by one batch, and its middle layer."""
    started = time.perf_counter()
    measure_heads(model, parts[-1], [layers[len(layers) // 2]], heads)
    once = time.perf_counter() - started
    started = time.perf_counter()
    measure_heads(model, parts[-1], [], heads)
    reading = time.perf_counter() - started
    return len(parts) * (reading + len(layers) * max(0.0, once - reading))
