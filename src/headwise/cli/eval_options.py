"""Eval options: what all evaluations take, defined once -> the signature of each, and the run they ask for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from headwise.cli import options
from headwise.cli.loading import check_kernel, parse_device, parse_dtype
from headwise.errors import ConfigurationError

if TYPE_CHECKING:
    from headwise.eval.executor import Executor
    from headwise.eval.model_source import ModelSource

WORKLOAD = "Workload"
_RUN = "Run"

T = TypeVar("T")

Seed = Annotated[
    int,
    typer.Option("--seed", metavar="N", help="Of all that is drawn: facts, random eviction, intervals."),
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="UTF-8 text; may be repeated. Python's own manual unless given.",
        rich_help_panel=options.INPUT,
    ),
]
UndoMarks = Annotated[
    bool,
    typer.Option(
        "--undo-marks",
        help="Write WikiText's @-@ and its kin as plain signs, and <unk> as a word.",
        rich_help_panel=options.INPUT,
    ),
]


Context = Annotated[
    int, typer.Option(metavar="N", help="Tokens that are read and compressed.", rich_help_panel=WORKLOAD)
]
Steps = Annotated[int, typer.Option(metavar="N", help="Tokens that are then fed one by one.", rich_help_panel=WORKLOAD)]
NewTokens = Annotated[int, typer.Option(metavar="N", help="Length of an answer at the most.", rich_help_panel=WORKLOAD)]
Out = Annotated[
    Path,
    typer.Option("--out", "-o", metavar="DIR", help="Folder for the records.", rich_help_panel=options.OUTPUT),
]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        metavar="SPEC",
        help="NAME or NAME:PARAMETER=VALUE,... such as snapkv:keep=0.25, or transformers' own quantized cache, "
        "such as transformers:quanto-int4; may be repeated. fastgen unless given; for a comparison, what "
        "--policies says.",
        rich_help_panel=options.POLICY,
    ),
]
NoRandom = Annotated[
    bool,
    typer.Option(
        "--no-random",
        help="Leave out random eviction of the same size, which every policy is otherwise held against.",
        rich_help_panel=options.POLICY,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in that folder.", rich_help_panel=_RUN)]
Ray = Annotated[bool, typer.Option("--ray", help="Spread the items over processes, with Ray.", rich_help_panel=_RUN)]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address", metavar="ADDRESS", help="Of a Ray cluster, instead of one here.", rich_help_panel=_RUN
    ),
]
RayCpus = Annotated[
    int, typer.Option("--ray-cpus", metavar="N", min=1, help="Processors per item.", rich_help_panel=_RUN)
]
RayGpus = Annotated[float, typer.Option("--ray-gpus", metavar="N", min=0, help="GPUs per item.", rich_help_panel=_RUN)]
ServerUrl = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        help="Of a vLLM server with headwise in it, which is asked instead of loading the model; see docs/vllm.md.",
        rich_help_panel=_RUN,
    ),
]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options that every evaluation has."""

    out: Out
    policy: Policies = None
    no_random: NoRandom = False
    evict_every: options.EvictEvery = 16
    cache_dtype: options.CacheDtype = "auto"
    resume: Resume = False
    seed: Seed = 0
    ray: Ray = False
    ray_address: RayAddress = None
    ray_cpus: RayCpus = 1
    ray_gpus: RayGpus = 0.0
    server: ServerUrl = None
    model: options.Model = None
    dtype: options.Dtype = "auto"
    device: options.Device = None
    kernel: options.Kernel = "auto"
    json_output: options.Json = False

    def executor(self) -> Executor:
        """Where the items are measured; nothing is loaded yet.

        Raises:
            ConfigurationError: for a dtype, device or kernel that there is not, or where Ray is not installed.
        """
        from headwise.eval.executor import LocalExecutor
        from headwise.eval.ray_executor import RayExecutor

        ray = self.ray or self.ray_address is not None
        source = self.source()
        if not ray:
            parse_device(self.device)
        if self.server is not None:
            return self._of_server(source, ray)
        if not ray:
            return LocalExecutor(source)
        return RayExecutor(source, self.ray_address, self.ray_cpus, self.ray_gpus)

    def source(self) -> ModelSource:
        """The model and how its caches are made; nothing is loaded yet.

        Raises:
            ConfigurationError: for a dtype or kernel that there is not.
        """
        from headwise.eval.model_source import ModelSource

        check_kernel(self.kernel)
        dtype = None if parse_dtype(self.dtype) is None else self.dtype
        rows = None if parse_dtype(self.cache_dtype) is None else self.cache_dtype
        return ModelSource(self.model, dtype, self.device, self.kernel, self.evict_every, rows)

    def _of_server(self, source: ModelSource, ray: bool) -> Executor:
        from headwise.eval.server_executor import ServerExecutor

        theirs = {"--ray": ray, "--device": self.device, "--cache-dtype": source.cache_dtype}
        theirs |= {"--kernel": self.kernel != "auto", "--evict-every": self.evict_every != 16}
        given = next((name for name, value in theirs.items() if value), None)
        if given is not None:
            raise ConfigurationError(f"{given} does not go with --server, which is how it was started")
        assert self.server is not None
        return ServerExecutor(source, self.server)


def with_run_options(act: Callable[[T, RunOptions], None]) -> Callable[[Callable[..., T]], Callable[..., None]]:
    """Decorator: a function of its own options -> a command that has the run's options too.

    All annotations of the function must be there when it is decorated, so none may need torch.

    Args:
        act: does the rest; takes what the function returns, and the run's options.
    """

    def decorate(make: Callable[..., T]) -> Callable[..., None]:
        own, shared = (inspect.signature(it, eval_str=True).parameters for it in (make, RunOptions))

        @wraps(make)
        def command(**given: Any) -> None:
            made = make(**{name: given[name] for name in own})
            act(made, RunOptions(**{name: given[name] for name in shared}))

        # What typer looks at.
        merged = {**own, **shared}
        keywords = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in merged.values()]
        command.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]  # functions take it
        command.__annotations__ = {name: parameter.annotation for name, parameter in merged.items()}
        return command

    return decorate


def parse_first_token(text: str | None) -> int | str | None:
    """A token id, or "bos".

    Raises:
        ConfigurationError: for anything else.
    """
    from headwise.eval.passages import BOS

    if text is None or text == BOS:
        return text
    if not text.isdecimal():
        raise ConfigurationError(f"--first-token takes a token id or {BOS}, got {text!r}")
    return int(text)
