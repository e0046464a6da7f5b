"""Generate: a prompt and options -> text as it streams, then what it cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headwise.cli import options
from headwise.cli.cache_request import read_cache_request
from headwise.cli.emphasis import Alpha, Emphasize, Heads, read_emphasis, save_span_shares
from headwise.cli.generate_table import show_costs
from headwise.cli.loading import load, parse_device, parse_dtype
from headwise.cli.outcome import GenerateResult
from headwise.cli.prompt import check_fit, read_prompt
from headwise.cli.tables import heading, message
from headwise.cli.text_generation import Generated, Sampling, any_seed, generate_text, stock_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headwise.hosts.transformers.cache import HeadwiseCache
    from headwise.types import Tensor

CompareFull = Annotated[
    bool,
    typer.Option(
        "--compare-full",
        help="Run transformers' own cache too, and show where the texts differ.",
        rich_help_panel=options.OUTPUT,
    ),
]


def generate(
    prompt: options.Prompt = None,
    file: options.File = None,
    raw: options.Raw = False,
    policy: options.Recommended = None,
    recovery: options.Recovery = None,
    settings: options.Settings = None,
    budget: options.Budget = None,
    bits: options.Bits = None,
    less: options.Less = False,
    less_kernels: options.LessKernels = None,
    match: options.Match = False,
    evict_every: options.EvictEvery = 16,
    emphasize: Emphasize = None,
    heads: Heads = None,
    alpha: Alpha = None,
    max_new_tokens: options.MaxNewTokens = 200,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    kernel: options.Kernel = "auto",
    cache_dtype: options.CacheDtype = "auto",
    prefill_chunk: options.PrefillChunk = None,
    compare_full: CompareFull = False,
    json_output: options.Json = False,
    png: options.Png = None,
) -> None:
    """Generate text with a compressed cache, and show what it saved.

    The text goes to standard output, everything else to standard error.
    """
    from headwise.report.picture import check_target, save_map

    request = read_cache_request(
        policy, recovery, settings, budget, bits, less, less_kernels, match, kernel, cache_dtype, evict_every
    )
    emphasis = read_emphasis(emphasize, heads, alpha)
    sampling = Sampling(max_new_tokens, temperature, any_seed(seed), prefill_chunk)
    text = read_prompt(prompt, file)
    if png is not None:
        check_target(png)
    where = parse_dtype(dtype), parse_device(device)

    started = time.perf_counter()
    loaded, tokenizer = load(model, *where)
    ids, marked = emphasis.encode(tokenizer, text, raw=raw)
    check_fit(loaded, ids.shape[-1], max_new_tokens)
    steering, chunk = emphasis.of_model(loaded), ids.shape[-1] if prefill_chunk else None

    def make() -> HeadwiseCache:
        cache = request.make(loaded, tokenizer, chunk, steering)
        if marked is not None:
            cache.mark(marked)
        return cache

    result = _generate(loaded, tokenizer, ids, make, sampling, started, compare_full, quiet=json_output)
    if png is not None and steering is not None and marked is not None:
        save_span_shares(loaded, ids, marked, steering, png)
    elif png is not None:
        save_map(result.report, png)
    if json_output:
        typer.echo(json.dumps(result.to_dict(), indent=2))
        return
    _show(result, png)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    make: Callable[[], HeadwiseCache],
    sampling: Sampling,
    started: float,
    compare_full: bool,
    *,
    quiet: bool,
) -> GenerateResult:
    """Generate with the cache, and then perhaps with transformers' own.

    Args:
        started: when loading began.
        quiet: write nothing while tokens come.
    """
    cache = make()
    policy = cache.policy
    load_seconds = time.perf_counter() - started
    if compare_full and not quiet:
        heading(str(policy))
    try:
        generated = generate_text(model, tokenizer, ids, cache, sampling, _writer(_to_output, quiet))
    finally:
        # Also when it is interrupted: what comes next begins a line.
        if not quiet:
            typer.echo()
    report = cache.report()
    # The model's own attention comes back with the end of the cache.
    del cache
    if not compare_full:
        return GenerateResult(policy, ids.shape[-1], load_seconds, generated, report)
    if not quiet:
        heading("full cache")
    full, memory = _generate_with_stock(model, tokenizer, ids, sampling, _writer(message, quiet))
    return GenerateResult(policy, ids.shape[-1], load_seconds, generated, report, full, memory)


def _generate_with_stock(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    sampling: Sampling,
    write: Callable[[str], object],
) -> tuple[Generated, dict[str, int]]:
    from headwise.measure.stock_caches import dynamic_cache

    stock = dynamic_cache(model)
    return generate_text(model, tokenizer, ids, stock, sampling, write), stock_memory(stock)


def _show(result: GenerateResult, png: Path | None) -> None:
    if result.full is not None:
        message("\n\n" + result.difference(result.full) + "\n")
    show_costs(result)
    if png is not None:
        message(f"picture: {png}\n")


def _writer(write: Callable[[str], object], quiet: bool) -> Callable[[str], object]:
    return (lambda _: None) if quiet else write


def _to_output(piece: str) -> None:
    typer.echo(piece, nl=False)
