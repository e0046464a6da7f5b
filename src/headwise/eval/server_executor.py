"""Server executor: jobs -> their units, measured by asking a vLLM server that has headwise in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from headwise.contract import LayerShape
from headwise.errors import ConfigurationError, ModelNotFoundError
from headwise.eval.contenders import Contender, PolicyContender, RandomOfSameSize
from headwise.eval.executor import Executor, Job, Prepared
from headwise.eval.greedy import end_ids
from headwise.eval.model_source import ModelSource
from headwise.eval.run_folder import Unit
from headwise.eval.server import ServedPrompt, Server
from headwise.eval.task import Task
from headwise.hosts.transformers.model_facts import kv_heads
from headwise.hosts.transformers.models import find_default_model
from headwise.hosts.vllm.options import Options
from headwise.measure.model_info import describe_model
from headwise.policies import Full
from headwise.policies.words import policy_words
from headwise.version import __version__


class ServerExecutor(Executor):
    """Items in turn, each by a request or two.

    Args:
        source: names the model, whose tokenizer and configuration are read here.
        url: of the server.

    Raises:
        ConfigurationError: when it is not said in which dtype the server computes, which it does not tell.
    """

    def __init__(self, source: ModelSource, url: str) -> None:
        if source.dtype is None:
            raise ConfigurationError("a server does not tell in which dtype it computes: say it with --dtype")
        self._source, self._url = source, url
        self._place = source.model or find_default_model()
        self._shape: PreTrainedModel | None = None
        self._server: Server | None = None

    def describe(self) -> dict[str, Any]:
        """The source and the server, whose options are not ours."""
        return {**asdict(self._source), "kernel": "vLLM's own", "evict_every": None, "server": self._url}

    def prepare(self, tasks: Sequence[Task]) -> Prepared:
        """At once, and the server is asked what it is.

        Raises:
            ConfigurationError: for a task that needs the model here.
        """
        local = next((task.label for task in tasks if not task.through_server), None)
        if local is not None:
            raise ConfigurationError(
                f"{local!r} cannot be measured through a server; fidelity, recall and synthetic can"
            )
        shape, server = self._model(), self._asked()
        items = {task.label: task.items(server.tokenizer) for task in tasks}
        model = describe_model(shape, self._source.name) | {"dtype": f"torch.{self._source.dtype}"}
        # What else takes part is the server's, which does not say.
        versions: dict[str, str | None] = {"vllm": server.release, "headwise here": __version__}
        machine = {"server": self._url, "block_size": server.block_size, **server.model}
        return Prepared(items, model, machine, versions)

    def measure(self, jobs: Sequence[Job]) -> Iterator[Unit]:
        """Every unit by itself; what cannot be asked for is refused before the first."""
        for contender in {each.label: each for job in jobs for each in job.contenders}.values():
            if contender.twin_of is None:
                _options(contender)
        for job in jobs:
            reference, kept = job.task.reference_served(self._asked(), job.item), dict(job.kept)
            for contender in job.contenders:
                tokens = job.task.prompt_tokens(job.item)
                prompt = self._prompt(contender, kept, tokens)
                measured = job.task.measure_served(self._asked(), job.item, prompt, reference)
                kept[contender.label] = measured.kept_ratio
                yield Unit(job.task.label, job.item.key, contender.label, job.item.digest, measured)

    def _prompt(self, contender: Contender, kept: dict[str, float], tokens: int) -> ServedPrompt:
        """What becomes of a prompt of so many tokens."""
        size, row = self._asked().block_size, self._row_bytes()
        if isinstance(contender, RandomOfSameSize):
            whole = max(tokens // size, 1)
            stay = max(round((kept[contender.other] * tokens - tokens % size) / size), 1)
            options: Options | None = Options(f"random:seed={contender.seed}", min(stay / whole, 1.0))
        else:
            options = _options(contender)
        if options is None:
            return ServedPrompt(None, 1.0, tokens * row, tokens * row)
        whole, stay = options.blocks(tokens, size)
        left = tokens - (whole - stay) * size
        return ServedPrompt(options, left / tokens, left * row, tokens * row)

    def _row_bytes(self) -> int:
        """Bytes of a token; the plugin serves none whose layers differ in that."""
        config = self._model().config.get_text_config(decoder=True)
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layer = LayerShape(kv_heads(config) or config.num_attention_heads, dim, dim)
        return int(config.num_hidden_layers * layer.token_bytes(getattr(torch, str(self._source.dtype))))

    def _asked(self) -> Server:
        if self._server is None:
            vocabulary = self._model().config.get_text_config().vocab_size
            tokenizer, generation = AutoTokenizer.from_pretrained(self._place), self._model().generation_config
            self._server = Server(self._url, tokenizer, vocabulary, end_ids(generation, tokenizer))
        return self._server

    def _model(self) -> PreTrainedModel:
        """The model without its weights."""
        if self._shape is None:
            try:
                with torch.device("meta"):
                    self._shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self._place))
                with contextlib.suppress(OSError):
                    # Not every model has one.
                    self._shape.generation_config = GenerationConfig.from_pretrained(self._place)
            except (OSError, ValueError) as error:
                raise ModelNotFoundError(f"cannot read the configuration of {self._source.name!r}: {error}") from error
        return self._shape


def _options(contender: Contender) -> Options | None:
    """What is asked for, of a policy as evaluations name it; None for the full cache.

    Raises:
        ConfigurationError: when it cannot be asked for.
    """
    if not isinstance(contender, PolicyContender) or contender.budget is not None:
        raise ConfigurationError(f"{contender.label!r} cannot be asked of a server: policies with a share are")
    policy = contender.policy
    if isinstance(policy, Full):
        return None
    given = policy.parameters()
    keep = given.get("keep")
    if not isinstance(keep, float):
        why = "has no keep" if "keep" not in given else "has a size that is no share of the prompt"
        raise ConfigurationError(
            f"{contender.label!r} {why}: a server can be asked for policies with keep=0.25 and such"
        )
    if given.get("of", "prompt") != "prompt":
        raise ConfigurationError(
            f"{contender.label!r}: a server keeps a share of the prompt and all that is written, not a share of all; "
            "say of=prompt"
        )
    # What is chosen once does not ask what a share is of.
    options = Options(policy_words(policy, without=("keep", "of")), keep)
    if options.keeping(1) != policy.with_keep(1):
        raise ConfigurationError(f"{contender.label!r} cannot be said in words, as a server wants them")
    return options
