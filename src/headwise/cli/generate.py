"""Generate: a prompt and options -> text as it streams, then what it cost."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwise.cli import options
from headwise.cli.loading import check_kernel, load, parse_device, parse_dtype, with_additions
from headwise.cli.prompt import check_fit, encode, read_prompt
from headwise.cli.running import Run, Sampling, differing_words, first_difference, run, stock_memory
from headwise.cli.tables import heading, message, show_costs
from headwise.policies.words import build_policy, describe_policy, read_budget
from headwise.report.picture import check_target, save_map

if TYPE_CHECKING:
    from headwise.policies import Policy
    from headwise.report.report import Report

_SEEDS = 2**32

_SAMPLING = "Sampling"


@dataclass(frozen=True)
class Outcome:
    """A run with a headwise cache, and perhaps one with transformers' own."""

    policy: Policy
    prompt_tokens: int
    load_seconds: float
    run: Run
    report: Report
    full: Run | None = None
    full_memory: dict[str, int] | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """Where the time went. Prefill is the time to the first token without what profile and pages took of it."""
        profile, compact = self.report.profile_seconds, self.report.compact_seconds
        return {
            "load": self.load_seconds,
            "prefill": max(0.0, self.run.first - profile - compact),
            "profile": profile,
            "compact": compact,
            "decode": self.run.rest,
        }

    @property
    def first_difference(self) -> int | None:
        """The first new token in which the two texts differ; None when they are equal."""
        return None if self.full is None else first_difference(self.run.token_ids, self.full.token_ids)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        report = self.report
        result = {
            "text": self.run.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.run.token_ids),
            "policy": describe_policy(self.policy),
            "memory": {
                "used_bytes": report.used_bytes,
                "allocated_bytes": report.allocated_bytes,
                "full_bytes": report.full_bytes,
                **report.remembered,
            },
            "kept_ratio": report.kept_ratio,
            "rules": report.rule_counts,
            "kernel": report.kernel,
            "seconds": self.seconds,
        }
        if report.sampled is not None and report.sampled < 1:
            result["sampled"] = report.sampled
        if self.full is not None:
            result["full"] = {
                "text": self.full.text,
                "first_difference": self.first_difference,
                "memory": self.full_memory,
            }
        return result


def generate(
    prompt: options.Prompt = None,
    file: options.File = None,
    raw: options.Raw = False,
    policy: options.PolicyName = "fastgen",
    recovery: options.Recovery = None,
    settings: options.Settings = None,
    budget: options.Budget = None,
    bits: options.Bits = None,
    less: options.Less = False,
    less_kernels: options.LessKernels = None,
    evict_every: options.EvictEvery = 16,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="New tokens at most.", rich_help_panel=_SAMPLING)
    ] = 200,
    temperature: Annotated[
        float,
        typer.Option(metavar="T", help="0 always takes the likeliest token.", rich_help_panel=_SAMPLING),
    ] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Of the draw, for a temperature over 0.", rich_help_panel=_SAMPLING),
    ] = None,
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    kernel: options.Kernel = "auto",
    cache_dtype: options.CacheDtype = "auto",
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Give the prompt in pieces of that many tokens.", rich_help_panel=options.MODEL
        ),
    ] = None,
    compare_full: Annotated[
        bool,
        typer.Option(
            "--compare-full",
            help="Run transformers' own cache too, and show where the texts differ.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    json_output: options.Json = False,
    png: options.Png = None,
) -> None:
    """Generate text with a compressed cache, and show what it saved.

    The text goes to standard output, everything else to standard error.
    """
    chosen = build_policy(policy, recovery, settings or (), budgeted=budget is not None)
    chosen = with_additions(chosen, bits, less, less_kernels)
    room = None if budget is None else read_budget(budget)
    drawn = random.randrange(_SEEDS) if seed is None else seed
    sampling = Sampling(max_new_tokens, temperature, drawn, prefill_chunk)
    text = read_prompt(prompt, file)
    if png is not None:
        check_target(png)
    where = parse_dtype(dtype), parse_device(device)
    check_kernel(kernel)
    rows_dtype = parse_dtype(cache_dtype)

    started = time.perf_counter()
    loaded, tokenizer = load(model, *where)
    ids = encode(tokenizer, text, raw=raw)
    check_fit(loaded, ids.shape[-1], max_new_tokens)

    from transformers import DynamicCache

    from headwise import HeadwiseCache

    prompt_tokens = ids.shape[-1] if prefill_chunk else None
    cache = HeadwiseCache(
        loaded,
        chosen,
        tokenizer=tokenizer,
        prompt_tokens=prompt_tokens,
        kernel=kernel,
        evict_every=evict_every,
        budget=room,
        cache_dtype=rows_dtype,
    )
    chosen = cache.policy
    load_seconds = time.perf_counter() - started
    if compare_full and not json_output:
        heading(str(chosen))
    try:
        result = run(loaded, tokenizer, ids, cache, sampling, _nothing if json_output else _to_output)
    finally:
        # Also when it is interrupted: what comes next begins a line.
        if not json_output:
            typer.echo()
    report = cache.report()
    # The model's own attention comes back with the end of the cache.
    del cache
    full, memory = None, None
    if compare_full:
        if not json_output:
            heading("full cache")
        stock = DynamicCache(config=loaded.config.get_text_config(decoder=True))
        full = run(loaded, tokenizer, ids, stock, sampling, _nothing if json_output else message)
        memory = stock_memory(stock)
    outcome = Outcome(chosen, ids.shape[-1], load_seconds, result, report, full, memory)
    if png is not None:
        save_map(report, png)
    if json_output:
        typer.echo(json.dumps(outcome.to_dict(), indent=2))
        return
    if full is not None:
        message("\n\n" + _difference(outcome, full) + "\n")
    show_costs(outcome)
    if png is not None:
        message(f"picture: {png}\n")


def _nothing(_: str) -> None:
    pass


def _to_output(piece: str) -> None:
    typer.echo(piece, nl=False)


def _difference(outcome: Outcome, full: Run) -> str:
    index = outcome.first_difference
    if index is None:
        return f"both texts are the same, all {len(full.token_ids)} new tokens"
    ours, theirs = differing_words(outcome.run.text, full.text)
    if outcome.run.text == full.text:
        return f"the texts read the same and differ in new token {index}"
    return (
        f"the texts first differ in new token {index}: {_word(ours)} with {outcome.policy.title}, "
        f"{_word(theirs)} with the full cache"
    )


def _word(word: str) -> str:
    return f"“{word}”" if word else "the end"
