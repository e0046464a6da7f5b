"""Run: a plan and a way to a model -> a record, filled in as far as the run gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from headwise.bench import stock
from headwise.bench.candidates import KVPRESS, Candidate, dtype_name
from headwise.bench.contestant import Contestant, Local
from headwise.bench.measure import measure
from headwise.bench.peer import Peer, PeerError, Remote
from headwise.bench.plan import PROFILE_CONTEXT, Configuration, Plan
from headwise.bench.record import Measurement, ProfileCost, Record, Result
from headwise.bench.shapes import Shape, available_bytes
from headwise.bench.workload import random_ids, text_ids
from headwise.errors import InputError
from headwise.hosts.transformers.model_facts import read_facts
from headwise.policies import FastGen
from headwise.types import Int, Tensor
from headwise.units import format_bytes

_SAMPLE = 0.1

# What else there is beside weights and caches: activations, the buffer that bandwidth is measured with.
_HEADROOM = 2**30


@dataclass(frozen=True)
class Subject:
    """What is measured with.

    Attributes:
        tokenizer: None for made-up weights.
        shape: of made-up weights; None for a model that was loaded.
    """

    model: stock.Model
    tokenizer: stock.Tokenizer | None
    shape: Shape | None = None

    def ids(self, batch: int, length: int) -> Int[Tensor, "b t"]:
        """Tokens to read: text, or random ones where there is no tokenizer."""
        if self.tokenizer is None:
            return random_ids(self.model.config.vocab_size, batch, length)
        return text_ids(self.tokenizer, batch, length)

    def describe(self, name: str) -> dict[str, Any]:
        """Plain values."""
        config = self.model.config.get_text_config(decoder=True)
        return {
            "name": name,
            "random_weights": self.shape is not None,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        }

    def for_peer(self) -> dict[str, Any]:
        """How another process gets the same model."""
        if self.shape is not None:
            return {"config": stock.llama_dimensions(self.shape)}
        return {"folder": self.model.config._name_or_path}


def run(
    plan: Plan,
    name: str,
    subject_of: Callable[[torch.dtype], Subject],
    python: str | None,
    record: Record,
    say: Callable[[str], None],
) -> None:
    """Measure everything, dtype by dtype.

    Args:
        name: of the model.
        subject_of: loads it in a dtype.
        python: an interpreter that has kvpress, where a candidate needs it.
        record: what to fill.
        say: takes a word on how far it is.

    Raises:
        InputError: when contexts or memory do not suffice.
    """
    for dtype in dict.fromkeys(configuration.dtype for configuration in plan.configurations):
        subject = subject_of(dtype)
        config = subject.model.config.get_text_config(decoder=True)
        plan.check_positions(getattr(config, "max_position_embeddings", None))
        check_memory(plan, subject.model.device, read_facts(subject.model)[0].token_bytes)
        record.model = subject.describe(name)
        peer = None if python is None else Peer(python)
        try:
            obstacle = None if peer is None else _load(peer, subject, record, say)
            for configuration in plan.configurations:
                if configuration.dtype == dtype:
                    _run_one(configuration, plan, subject, peer, obstacle, record, say)
            if plan.profile_repeats and record.profile is None:
                _run_profile(plan, subject, record, say)
        finally:
            if peer is not None:
                peer.close()


def check_memory(plan: Plan, device: torch.device, row_bytes: Callable[[torch.dtype], int], weights: int = 0) -> None:
    """Refuse what cannot fit before it is begun.

    On a GPU only the weights are looked at: a cache that does not fit is a result, and is reported as one. On a
    CPU it would end in a frozen machine or a killed process.

    Args:
        row_bytes: of a full cache, per token of a sequence, by dtype.
        weights: bytes of weights that are yet to be made.

    Raises:
        InputError: with what is needed and what there is.
    """
    needed = weights if device.type == "cuda" else weights + plan.cache_bytes(row_bytes) + _HEADROOM
    there = available_bytes(device)
    if needed > there:
        raise InputError(
            f"this needs about {format_bytes(needed)} of memory and {device} has {format_bytes(there)} available; "
            "try a smaller shape, batch or context, fewer candidates, or --dtype bfloat16"
        )


def _run_one(
    configuration: Configuration,
    plan: Plan,
    subject: Subject,
    peer: Peer | None,
    obstacle: str | None,
    record: Record,
    say: Callable[[str], None],
) -> None:
    result = Result(configuration, plan.steps, [])
    record.results.append(result)
    pairs: list[tuple[Contestant, Measurement]] = []
    for candidate in configuration.candidates:
        measurement = Measurement(candidate.name, candidate.kind, candidate.setting, candidate.keep, candidate.coded)
        result.measurements.append(measurement)
        if candidate.kind != KVPRESS:
            pairs.append((Local(candidate, subject.model, subject.tokenizer, plan), measurement))
        elif peer is not None and obstacle is None:
            pairs.append((Remote(candidate, peer), measurement))
        else:
            measurement.failure = obstacle or "there is no Python to run it"
    ids = subject.ids(configuration.batch, configuration.context + plan.new_tokens)
    try:
        measure(pairs, result, ids, plan, subject.model.device, say)
    finally:
        for contestant, _ in pairs:
            contestant.close()


def _load(peer: Peer, subject: Subject, record: Record, say: Callable[[str], None]) -> str | None:
    """Let the peer load the model; returns why it cannot."""
    say("kvpress loads the model")
    try:
        versions = peer.load(subject.for_peer(), subject.model.dtype, subject.model.device)
    except (PeerError, torch.OutOfMemoryError) as error:
        return str(error)
    record.versions |= {f"peer: {package}": str(version) for package, version in versions.items()}
    return None


def _run_profile(plan: Plan, subject: Subject, record: Record, say: Callable[[str], None]) -> None:
    """The stock prefill and both profiles in turn, once per repetition."""
    dtype = dtype_name(subject.model.dtype)
    record.profile = cost = ProfileCost(PROFILE_CONTEXT, dtype)
    ids = subject.ids(1, PROFILE_CONTEXT)
    fields = {
        "stock": Candidate("stock", "stock"),
        "exact": Candidate("exact", "headwise", FastGen(0.95)),
        "sampled": Candidate("sampled", "headwise", FastGen(0.95, profile_rows=_SAMPLE)),
    }
    contestants = {name: Local(c, subject.model, subject.tokenizer, plan) for name, c in fields.items()}
    try:
        for contestant in contestants.values():
            contestant.prefill(ids[:, : PROFILE_CONTEXT // 16])
        for number in range(plan.profile_repeats):
            say(f"profile of {PROFILE_CONTEXT:,} tokens in {dtype}, {number + 1} of {plan.profile_repeats}")
            cost.stock_seconds.append(contestants["stock"].prefill(ids).seconds)
            for name, seconds in (("exact", cost.exact_seconds), ("sampled", cost.sampled_seconds)):
                profile = contestants[name].prefill(ids).profile_seconds
                assert profile is not None
                seconds.append(profile)
    finally:
        for contestant in contestants.values():
            contestant.close()
