"""Task: a tokenizer -> items, and an item read into a compressed cache -> what the compression did to it."""

from __future__ import annotations

import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from headwise.errors import InputError
from headwise.eval.cache_kinds import CacheKind
from headwise.eval.server import Served, ServedPrompt, Server
from headwise.hosts.transformers.cache import HeadwiseCache
from headwise.measure.model_info import positions
from headwise.report.report import Report
from headwise.types import Float, Int, Tensor

Query = Literal["none", "aware", "agnostic"]


@dataclass(frozen=True)
class Item:
    """One thing to measure.

    Attributes:
        key: unique within its task, and the same in every run with the same seed and options.
        data: what the task needs to measure it; plain JSON values.
    """

    key: str
    data: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        """Hash of the data, so that two runs can be known to have measured the same thing."""
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Measured:
    """What was found out about one item with one kind of cache.

    Attributes:
        metrics: by name; tables show their mean over the items.
        kept_ratio: kept rows over the rows of a full cache, at the end of the context.
        used_bytes, full_bytes: of the rows kept, and of a full cache, at the same moment.
        prefill_seconds: reading the context, compression included.
        compress_seconds: the part of it that is profiling, scoring and compacting.
        details: anything else worth keeping, such as the answer given; plain JSON values.
    """

    metrics: dict[str, float]
    kept_ratio: float
    used_bytes: int
    full_bytes: int
    prefill_seconds: float
    compress_seconds: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Subject:
    """The model under test.

    Attributes:
        options: of every `HeadwiseCache`, such as `kernel` and `evict_every`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: dict[str, Any] = field(default_factory=dict)

    def check_room(self, tokens: int) -> None:
        """Refuse more tokens than the model has positions for.

        Raises:
            InputError: with both numbers.
        """
        room = positions(self.model)
        if room is not None and tokens > room:
            raise InputError(f"{tokens:,} tokens do not fit into the model's {room:,} positions; take fewer")

    def read(self, ids: Int[Tensor, "b t"], kind: CacheKind) -> Context:
        """Read a context into a new cache of that kind and compress it."""
        cache = kind.make(self.model, self.tokenizer, ids.shape[-1], self.options)
        return self.read_into(cache, ids, kind)

    def read_into(self, cache: Cache, ids: Int[Tensor, "b t"], kind: CacheKind) -> Context:
        """The same into a cache that is there."""
        started = time.perf_counter()
        with torch.inference_mode():
            output = self.model(input_ids=ids.to(self.model.device), past_key_values=cache, logits_to_keep=1)
        seconds = time.perf_counter() - started
        return Context(cache, kind.report(self.model, cache, ids.shape[-1]), seconds, output.logits[:, -1].float())

    def feed(self, cache: Cache, ids: Int[Tensor, "1 t"]) -> Float[Tensor, "t vocabulary"]:
        """Logits of tokens that follow what the cache holds, as if they had come one at a time.

        The rules are applied once in `evict_every` tokens, and some policies choose again from time to time. What lies
        between two of those moments goes in one pass: it is the same as token by token.
        """
        with torch.inference_mode():
            passes = self.passes(cache, ids)
            return torch.cat([self.model(input_ids=part, past_key_values=cache).logits[0] for part in passes])

    def passes(self, cache: Cache, ids: Int[Tensor, "1 t"]) -> tuple[Int[Tensor, "1 q"], ...]:
        """Those tokens, as many at a time as may come at once."""
        every = self.options.get("evict_every", 1)
        if isinstance(cache, HeadwiseCache) and (again := cache.policy.chooser.again) is not None:
            every = math.gcd(every, again.every)
        return tuple(ids.to(self.model.device).split(every, dim=1))


@dataclass
class Context:
    """A context in a compressed cache.

    Attributes:
        report: at its end.
        seconds: it took to read and compress.
        logits: of the token that follows.
    """

    cache: Cache
    report: Report
    seconds: float
    logits: Float[Tensor, "b vocabulary"]

    def measured(self, metrics: dict[str, float], **details: Any) -> Measured:
        """Those metrics, with what the compression took and left."""
        report = self.report
        return Measured(
            metrics=metrics,
            kept_ratio=report.kept_ratio,
            used_bytes=report.used_bytes,
            full_bytes=report.full_bytes,
            prefill_seconds=self.seconds,
            compress_seconds=report.profile_seconds + report.compact_seconds,
            details=details,
        )


class Task(ABC):
    """Something that can be measured with any kind of cache. Subclasses are frozen dataclasses: their options.

    Attributes:
        name: as the command line and the records have it.
        query: whether the question is in the context while it is compressed ("aware"), comes after ("agnostic"), or
            there is none.
        primary: the metric that curves and rankings are made of.
        higher_is_better: of the primary metric.
        through_server: whether a vLLM server can be asked instead of a model here; said by every class anew.
    """

    name: ClassVar[str]
    query: Query = "none"
    primary: ClassVar[str]
    higher_is_better: ClassVar[bool]
    through_server: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        """What a class changes of another's measuring, a server knows nothing of, unless it says so."""
        super().__init_subclass__(**options)
        if "through_server" not in vars(cls):
            cls.through_server = False

    @property
    def title(self) -> str:
        """What it measures, whatever the query: tasks of the same title share a table."""
        return self.name

    @property
    def label(self) -> str:
        """How records call it; no two tasks of a run have the same."""
        return self.title if self.query == "none" else f"{self.title}, {self.query}"

    @abstractmethod
    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
        """What there is to measure.

        Raises:
            InputError: when the text or file given does not suffice.
        """

    def reference(self, subject: Subject, item: Item) -> Any:
        """What all caches are compared with, made once per item; None where nothing is."""
        return None

    @abstractmethod
    def measure(self, subject: Subject, item: Item, kind: CacheKind, reference: Any) -> Measured:
        """One item with one kind of cache, which may be the full one."""

    def prompt_tokens(self, item: Item) -> int:
        """How many tokens of an item a server compresses; of tasks that can be measured `through_server`."""
        raise NotImplementedError

    def reference_served(self, server: Server, item: Item) -> Any:
        """What all policies are compared with, made once per item; None where nothing is."""
        return None

    def measure_served(self, server: Server, item: Item, prompt: ServedPrompt, reference: Any) -> Measured:
        """One item by a server, its prompt compressed in that way."""
        raise NotImplementedError


def measured_served(prompt: ServedPrompt, served: Served, metrics: dict[str, float], **details: Any) -> Measured:
    """Those metrics, with what the compression took and left."""
    left = prompt.kept_ratio, prompt.used_bytes, prompt.full_bytes
    return Measured(metrics, *left, served.seconds, served.choosing, details)
