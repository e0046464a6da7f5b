"""Choice: a prompt with a marked fact, and two answers -> which of them the model prefers, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from headwise.eval.cache_kinds import CacheKind
from headwise.eval.steering.treatments import Treatment
from headwise.eval.task import Context, Item, Measured, Subject, Task
from headwise.hosts.transformers.marked import encode_marked
from headwise.measure.chat import Prompt, write_answer, write_prompt
from headwise.measure.contrasts import Contrast, first_answers
from headwise.measure.samples import contrasts_of
from headwise.policies.checks import check_count

# Examples before a prompt, where that is how the model is told.
_EXAMPLES = 3
# The seed of samples that are measured is another than that of samples that heads were profiled by.
_MEASURED = 1_000_003

# Prompts with their answers.
_Shown = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Choice(Task):
    """Contrasts, each asked in several ways. Metrics, as in PASTA (Zhang et al., ICLR 2024, section 4):

    `efficacy`: whether the wanted answer is likelier than the other. `paraphrase`: the share of the paraphrases for
    which it is. `margin`: the logarithm of how many times as likely it is, for the prompt itself.

    Args:
        kind: of contrasts that are made, or a file of them.
        count: prompts.
        seed: of the prompts; a seed draws others for this than for profiling.
    """

    kind: str = "occupation"
    count: int = 100
    seed: int = 0

    name: ClassVar[str] = "choice"
    primary: ClassVar[str] = "efficacy"
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("count", self.count, 1)

    @property
    def title(self) -> str:
        """With the kind."""
        return f"{self.name}: {self.kind}"

    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
        """One for every contrast, with others of its kind as examples."""
        samples = contrasts_of(self.kind, self.count, self.seed + _MEASURED)
        shown = contrasts_of(self.kind, _EXAMPLES, self.seed + 2 * _MEASURED)
        examples = [(each.text, each.wanted) for each in shown]
        return [Item(f"{i:05d}", {**each.to_dict(), "examples": examples}) for i, each in enumerate(samples)]

    def measure(self, subject: Subject, item: Item, kind: CacheKind, reference: None) -> Measured:
        """Read the prompt and its paraphrases, each into a cache of its own."""
        assert isinstance(kind, Treatment)
        sample = Contrast.of(item.data)
        shown = item.data["examples"] if kind.examples else ()
        margins = []
        for text in (sample.text, *sample.paraphrases):
            context, margin = _margin(subject, kind, sample, shown, text)
            margins.append(margin)
        others = margins[1:]
        metrics = {"efficacy": float(margins[0] > 0), "margin": margins[0]}
        if others:
            metrics["paraphrase"] = sum(margin > 0 for margin in others) / len(others)
        return context.measured(metrics, margins=margins)


def _margin(subject: Subject, kind: Treatment, sample: Contrast, shown: _Shown, text: str) -> tuple[Context, float]:
    tokenizer = subject.tokenizer
    spans = Prompt("").ranges(text, sample.spans)
    written = kind.written(text, sorted(spans))
    if sample.chat:
        prompt = write_prompt(tokenizer, written, shown)
    else:
        before = "".join(f"{asked}{answer}.\n" for asked, answer in shown)
        prompt = Prompt(before + written, len(before))
    # Where signs are written, nothing is marked beside.
    marks = prompt.ranges(text, sample.spans) if written == text else []
    inputs, marked = encode_marked(tokenizer, prompt.text, marks, add_special_tokens=prompt.special)
    answers = (sample.wanted, sample.unwanted)
    texts = [write_answer(tokenizer, each) for each in answers] if sample.chat else answers
    wanted, unwanted = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in texts)
    common, one, other = first_answers(wanted, unwanted)
    ids = inputs["input_ids"].to(subject.model.device)
    ids = torch.cat([ids, torch.tensor([common], dtype=ids.dtype, device=ids.device)], dim=1) if common else ids
    cache = kind.make(subject.model, tokenizer, ids.shape[1], subject.options)
    kind.mark(cache, marked)
    context = subject.read_into(cache, ids, kind)
    return context, float(context.logits[0, one] - context.logits[0, other])
