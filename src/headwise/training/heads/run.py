"""Run: a model and tasks -> scores of every head for every task, written down as they are found.

PASTA's Algorithm 1 (Zhang et al., ICLR 2024), by margins: they tell heads apart by far fewer samples than accuracy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwise.errors import ConfigurationError, InputError, MismatchError, UnsupportedModelError
from headwise.files import read_text, whole_file
from headwise.hosts.transformers.model_facts import read_facts
from headwise.measure.samples import contrasts_of
from headwise.placement import device_of
from headwise.steer.steering import Steering
from headwise.training.heads.margins import (
    Batch,
    Margins,
    batches,
    estimated_seconds,
    measure_heads,
    measure_layers,
)
from headwise.training.heads.select import Scores
from headwise.training.run import Tell, model_name
from headwise.weights import fingerprint


@dataclass(frozen=True)
class Recipe:
    """What is asked.

    Attributes:
        tasks: kinds of contrasts that are made, or files of them.
        samples: of each.
        alpha: of the steering.
        coarse: only heads of so many of the best layers are tried, which are found first; None for all.
        seed: of the samples.
    """

    tasks: tuple[str, ...]
    samples: int
    alpha: float = 0.01
    coarse: int | None = None
    seed: int = 0


class HeadRun:
    """A run over all tasks.

    Args:
        work: file in which scores are written down.
        resume: go on with what is there.

    Raises:
        ConfigurationError: when there is something already, and it is not to be gone on with; or no task.
        InputError: when that is no such file, or a task is none.
        MismatchError: when it is of another model or was asked otherwise.
        UnsupportedModelError: when the model has no head that can be steered.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        work: Path,
        *,
        resume: bool = False,
    ) -> None:
        self._model, self._recipe, self._work = model, recipe, work
        if not recipe.tasks or len(set(recipe.tasks)) < len(recipe.tasks):
            raise ConfigurationError("heads are profiled by tasks, each of which is given once")
        self.layers, self.heads = steerable_heads(model)
        if recipe.coarse is not None and not 0 < recipe.coarse <= len(self.layers):
            raise ConfigurationError(f"the best 1 to {len(self.layers)} layers can be taken, got {recipe.coarse}")
        device = device_of(model)
        steering = Steering(None, recipe.alpha)
        self.parts: dict[str, list[Batch]] = {
            task: list(
                batches(tokenizer, contrasts_of(task, recipe.samples, recipe.seed), steering, self.heads, device)
            )
            for task in recipe.tasks
        }
        self._about = {
            "model": fingerprint(model),
            "model_name": model_name(model),
            "shape": [1 + max(self.layers), self.heads],
            **_plain(asdict(recipe)),
        }
        self._done: dict[str, dict[str, Any]] = {}
        if work.exists():
            if not resume:
                raise ConfigurationError(f"{str(work)!r} is there already; go on with --resume, or take another file")
            self._go_on()

    def estimate(self) -> float:
        """About how many seconds it will take."""
        task = self._recipe.tasks[0]
        whole = estimated_seconds(self._model, self.parts[task], self.layers, self.heads)
        whole *= sum(map(len, self.parts.values())) / len(self.parts[task])
        return whole if self._recipe.coarse is None else whole * self._recipe.coarse / len(self.layers)

    def run(self, tell: Tell = lambda what, done, total: None) -> dict[str, Scores]:
        """Mean margin of every head, by task and layer."""
        total, done = sum(map(len, self.parts.values())), 0
        for task, parts in self.parts.items():
            state = self._done.setdefault(task, {"batches": 0, "layers": None, "count": 0, "plain": 0.0, "heads": {}})
            if state["layers"] is None:
                state["layers"] = self._best_layers(parts)
            for number, part in enumerate(parts, 1):
                if number > state["batches"]:
                    found = measure_heads(self._model, part, state["layers"], self.heads)
                    self._note(state, number, found)
                done += 1
                tell(task, done, total)
        return {task: _means(state) for task, state in self._done.items()}

    @property
    def plain(self) -> dict[str, float]:
        """Mean margin without steering, by task."""
        return {task: state["plain"] / state["count"] for task, state in self._done.items()}

    def _best_layers(self, parts: Sequence[Batch]) -> list[int]:
        if self._recipe.coarse is None:
            return list(self.layers)
        whole: Margins | None = None
        for part in parts:
            found = measure_layers(self._model, part, self.layers, self.heads)
            whole = found if whole is None else whole + found
        assert whole is not None
        best = sorted(self.layers, key=lambda layer: (-whole.heads[layer][0], layer))
        return sorted(best[: self._recipe.coarse])

    def _note(self, state: dict[str, Any], number: int, found: Margins) -> None:
        state["batches"] = number
        state["count"], state["plain"] = state["count"] + found.count, state["plain"] + found.plain
        for layer, own in found.heads.items():
            before = state["heads"].get(str(layer), [0.0] * len(own))
            state["heads"][str(layer)] = [a + b for a, b in zip(before, own, strict=True)]
        with whole_file(self._work, "scores of heads") as scratch:
            self._work.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps({**self._about, "done": self._done}, indent=1) + "\n", encoding="utf-8")

    def _go_on(self) -> None:
        try:
            found = json.loads(read_text(self._work))
        except ValueError:
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("done"), dict):
            raise InputError(f"{str(self._work)!r} holds no scores of heads to go on with; remove it")
        differs = [name for name, value in self._about.items() if found.get(name) != value]
        if differs:
            raise MismatchError(f"{str(self._work)!r} was begun with another {', '.join(differs)}")
        self._done = found["done"]


def steerable_heads(model: PreTrainedModel) -> tuple[list[int], int]:
    """Layers with heads that can be steered, and how many query heads each has.

    Raises:
        UnsupportedModelError: when there are none, or layers have unequal numbers.
    """
    facts = read_facts(model)[0]
    counts = {i: each.query_heads for i, each in enumerate(facts.layers) if each.compressed and each.readers == 1}
    if not counts or len(set(counts.values())) > 1:
        raise UnsupportedModelError(
            f"{facts.name} has {'no' if not counts else 'unequal numbers of'} heads that can be steered"
        )
    return list(counts), next(iter(counts.values()))


def _means(state: Mapping[str, Any]) -> Scores:
    return {int(layer): [value / state["count"] for value in own] for layer, own in state["heads"].items()}


def _plain(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe | {"tasks": list(recipe["tasks"])}
