"""Emphasis: what of a prompt is to be emphasised, and which heads obey -> ids, what of them is marked, and steering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headwise.cli.prompt import encode
from headwise.cli.tables import message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headwise.steer.spans import Marked
    from headwise.steer.steering import Steering
    from headwise.types import Tensor

_STEERING = "Steering"

Emphasize = Annotated[
    list[str] | None,
    typer.Option(
        "--emphasize",
        metavar="TEXT",
        help="A part of the prompt that the model is to attend to (PASTA); may be repeated.",
        rich_help_panel=_STEERING,
    ),
]
Heads = Annotated[
    Path | None,
    typer.Option(
        "--heads",
        metavar="FILE",
        help="Which heads do so: a file of `headwise profile-heads`. Unless given, those that come with headwise for "
        "its default model, and all heads of any other.",
        rich_help_panel=_STEERING,
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(metavar="X", help="What other attention is multiplied by. [default: 0.01]", rich_help_panel=_STEERING),
]


@dataclass(frozen=True)
class Emphasis:
    """What is asked; nothing where no text is.

    Attributes:
        texts: parts of the prompt.
        steering: None for what goes with the model.
    """

    texts: tuple[str, ...]
    steering: Steering | None
    alpha: float

    def encode(self, tokenizer: PreTrainedTokenizerBase, text: str, *, raw: bool) -> tuple[Tensor, Marked | None]:
        """Ids of a prompt, and what of them is marked.

        Raises:
            InputError: when what is emphasised is not in it.
        """
        ids = encode(tokenizer, text, raw=raw)
        if not self.texts:
            return ids, None
        from headwise.hosts.transformers.marked import encode_marked
        from headwise.steer.spans import character_ranges

        ranges = [found for each in self.texts for found in character_ranges(text, each)]
        if raw or tokenizer.chat_template is None:
            return ids, encode_marked(tokenizer, text, ranges)[1]
        message = {"role": "user", "content": text}
        whole = str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
        # What a template writes before the prompt may say the same; some cut off the blanks around a prompt.
        at = whole.rindex(text.strip()) - (len(text) - len(text.lstrip()))
        shifted = [(start + at, stop + at) for start, stop in ranges]
        return ids, encode_marked(tokenizer, whole, shifted, add_special_tokens=False)[1]

    def of_model(self, model: PreTrainedModel) -> Steering | None:
        """How the model is steered; None where it is not."""
        if not self.texts:
            return None
        if self.steering is not None:
            return self.steering
        from headwise.steer.heads import made_for, shipped_heads
        from headwise.steer.steering import Steering
        from headwise.training.run import model_name

        shipped = shipped_heads()
        found = made_for(shipped)
        if found is not None and _alike(found[0], model_name(model)):
            return Steering(shipped, self.alpha)
        message("note: no heads are known for this model, so all are steered; `headwise profile-heads` finds some\n")
        return Steering(None, self.alpha)


def _alike(one: str, other: str) -> bool:
    """Whether they name the same model, one perhaps by its id on the Hub and the other by its folder."""
    return one.rpartition("/")[2].lower() == other.rpartition("/")[2].lower()


def read_emphasis(texts: Sequence[str] | None, heads: Path | None, alpha: float | None) -> Emphasis:
    """The options of the command line, checked before any model is read.

    Raises:
        ConfigurationError: when heads or alpha are given and nothing is emphasised, or alpha is out of range.
        InputError: when there is no such file of heads.
    """
    from headwise.errors import ConfigurationError
    from headwise.steer.steering import Steering

    if not texts and (heads is not None or alpha is not None):
        raise ConfigurationError("--heads and --alpha are for what is emphasised: give --emphasize TEXT")
    share = 0.01 if alpha is None else alpha
    steering = Steering(heads, share)
    return Emphasis(tuple(texts or ()), None if heads is None else steering, share)


def save_span_shares(model: PreTrainedModel, ids: Tensor, marked: Marked, steering: Steering, png: Path) -> None:
    """Draw what every head gives what is marked, before and after."""
    from headwise.hosts.transformers.span_share import span_shares
    from headwise.report.share_picture import save_shares

    save_shares(*span_shares(model, ids.to(model.device), marked, steering), png)
