"""Chat: what a user types, line by line -> answers over one cache that is kept, and what it holds after each."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.cli import options
from headwise.cli.cache_request import CacheRequest, read_cache_request
from headwise.cli.loading import load, parse_device, parse_dtype
from headwise.cli.prompt import check_fit, encode
from headwise.cli.tables import message
from headwise.cli.text_generation import Sampling, any_seed, generate_text
from headwise.errors import HeadwiseError
from headwise.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headwise.hosts.transformers.cache import HeadwiseCache
    from headwise.types import Tensor

_HELP = """/policy SPEC  go on with another policy; the conversation is read anew
/report       what the cache holds
/reset        forget the conversation
/quit         leave, as does the end of input; Ctrl-C breaks an answer off
"""

# Stands for an answer where it is asked what a template writes behind it.
_ANSWER = "\ue000"


def chat(
    policy: options.Recommended = None,
    budget: options.Budget = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")] = None,
    max_new_tokens: options.MaxNewTokens = 400,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    kernel: options.Kernel = "auto",
    cache_dtype: options.CacheDtype = "auto",
) -> None:
    """Talk with a model over one compressed cache, and see after every answer what it holds. /help has the commands."""

    def request(spec: str | None) -> CacheRequest:
        return read_cache_request(spec, budget=budget, kernel=kernel, cache_dtype=cache_dtype, set_apart=False)

    asked, where = request(policy), (parse_dtype(dtype), parse_device(device))
    sampling = Sampling(max_new_tokens, temperature, any_seed(seed))
    talk = Conversation(*load(model, *where), asked, sampling, system)
    message(f"{talk.cache.policy}; /help for commands\n")
    for line in _lines():
        try:
            if _command(talk, request, line.strip()):
                return
        except HeadwiseError as error:
            # A word that cannot be is no reason to leave.
            message(f"error: {error}\n")


def _command(talk: Conversation, request: Callable[[str | None], CacheRequest], line: str) -> bool:
    """Do what a line asks for; True when it is to leave."""
    word, _, rest = line.partition(" ")
    if word == "/quit":
        return True
    if word == "/report":
        message(f"{talk.cache.report()}\n")
    elif word == "/reset":
        talk.forget()
        message("forgotten\n")
    elif word == "/policy":
        talk.take(request(rest.strip() or None))
        message(f"{talk.cache.policy}\n")
    elif word.startswith("/"):
        message(_HELP)
    elif line:
        talk.say(line)
    return False


@dataclass
class Conversation:
    """What was said, and the cache that has read it.

    Attributes:
        ids: of everything that was said so far, as the model was given it and as it wrote it.
        messages: the same as text.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    request: CacheRequest
    sampling: Sampling
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache: HeadwiseCache = self.request.make(self.model, self.tokenizer)
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.ids = []
        self.cache.reset()

    def take(self, request: CacheRequest) -> None:
        """Go on under another policy, whose cache reads all that was said with the next question."""
        self.cache = request.make(self.model, self.tokenizer)

    def say(self, line: str) -> None:
        """Ask, write the answer to standard output, and tell what is held.

        Raises:
            InputError: when there is no room for it; nothing was said then.
        """
        said = {"role": "user", "content": line}
        ids = self._ids_with(said)
        check_fit(self.model, ids.shape[1], self.sampling.max_new_tokens)
        pieces: list[str] = []

        def write(piece: str) -> None:
            pieces.append(piece)
            typer.echo(piece, nl=False)

        self.messages.append(said)
        try:
            written = generate_text(self.model, self.tokenizer, ids, self.cache, self.sampling, write).token_ids
        except KeyboardInterrupt:
            # A pass was broken off: what was written stays said, and is read anew.
            self.cache.reset()
            written = self.tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
            message(" ... broken off")
        typer.echo()
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        self.ids = [*ids[0].tolist(), *written]
        report = self.cache.report()
        if not report.full_bytes:
            message("[nothing held; what was said is read anew with the next question]\n")
            return
        held, full = (format_bytes(count) for count in (report.allocated_bytes, report.full_bytes))
        share = report.allocated_bytes / report.full_bytes
        message(f"[{report.seen_tokens:,} tokens, {held} held of {full} ({share:.0%})]\n")

    def _ids_with(self, said: dict[str, str]) -> Tensor:
        """Ids of all that was said and is being said; they begin with those that the cache has read."""
        import torch

        if not self.ids:
            return self._encoded([*self.messages, said])
        behind = self._behind_answer(said)
        if behind is None:
            self.cache.reset()
            return self._encoded([*self.messages, said])
        more = self.tokenizer(behind, add_special_tokens=False)["input_ids"]
        return torch.tensor([[*self.ids, *more]])

    def _behind_answer(self, said: dict[str, str]) -> str | None:
        """What the template writes behind the last answer; None where it leaves answers out."""
        if self.tokenizer.chat_template is None:
            return f"\n\n{said['content']}\n\n"
        whole = self._templated([*self.messages[:-1], {"role": "assistant", "content": _ANSWER}, said])
        _, found, behind = whole.rpartition(_ANSWER)
        if not found:
            return None
        end = self.tokenizer.decode(self.ids[-1:])
        # The model wrote the end of its turn itself, unless it was cut short.
        return behind.removeprefix(end) if self.ids[-1] in self.tokenizer.all_special_ids else behind

    def _encoded(self, messages: list[dict[str, str]]) -> Tensor:
        if len(messages) == 1 or self.tokenizer.chat_template is None:
            text = "\n\n".join(each["content"] for each in messages)
            return encode(self.tokenizer, text, raw=self.tokenizer.chat_template is None)
        text = self._templated(messages)
        encoded: Any = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        ids: Tensor = encoded["input_ids"]
        return ids

    def _templated(self, messages: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _lines() -> Iterator[str]:
    """What a user types, or what a file has."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        # Lines can be edited and called back.
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
