"""Inspect: a text and one or two policies -> a page that shows which tokens every head holds while it answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headwise.cli import options
from headwise.cli.cache_request import CacheRequest, read_cache_request
from headwise.cli.loading import load, parse_device, parse_dtype
from headwise.cli.prompt import check_fit, encode, read_prompt
from headwise.cli.tables import message
from headwise.errors import ConfigurationError

if TYPE_CHECKING:
    from headwise.hosts.transformers.cache import HeadwiseCache

Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        metavar="SPEC",
        help="What to keep, such as auto:ratio=0.25 or snapkv:keep=0.5+int8; given twice, the two are shown side by "
        "side. auto:ratio=0.25+match unless given.",
        rich_help_panel=options.POLICY,
    ),
]
Out = Annotated[
    Path, typer.Option(metavar="FILE", help="The page; it needs no network.", rich_help_panel=options.OUTPUT)
]
MaxNewTokens = Annotated[
    int, typer.Option(min=0, metavar="N", help="Tokens of the answer, at most.", rich_help_panel=options.INPUT)
]
Moments = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="How often the cache is looked at, at most.", rich_help_panel=options.OUTPUT),
]


def inspect(
    prompt: options.Prompt = None,
    file: options.File = None,
    raw: options.Raw = False,
    policy: Policies = None,
    max_new_tokens: MaxNewTokens = 64,
    moments: Moments = 9,
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    kernel: options.Kernel = "auto",
    cache_dtype: options.CacheDtype = "auto",
    out: Out = Path("heads.html"),
) -> None:
    """See what every head keeps: one page with the heads, the text, and how it changes while an answer is written."""
    from headwise.files import check_target_file
    from headwise.hosts.transformers.models import DEFAULT_MODEL
    from headwise.units import format_bytes
    from headwise.viewer.page_file import write_page
    from headwise.viewer.recording import record

    if policy is not None and len(policy) > 2:
        raise ConfigurationError(f"at most two policies are shown side by side, got {len(policy)}")
    # That which `generate` takes where none is named.
    asked: list[str | None] = [None] if policy is None else [*policy]
    requests = [read_cache_request(s, kernel=kernel, cache_dtype=cache_dtype, set_apart=False) for s in asked]
    text = read_prompt(prompt, file)
    target = check_target_file(out, "a page")
    where = parse_dtype(dtype), parse_device(device)
    loaded, tokenizer = load(model, *where)
    ids = encode(tokenizer, text, raw=raw)
    check_fit(loaded, ids.shape[-1], max_new_tokens)
    recordings = []
    for request in requests:

        def make(request: CacheRequest = request) -> HeadwiseCache:
            return request.make(loaded, tokenizer)

        def told(what: str) -> None:
            message(f"{what}: {ids.shape[-1]:,} tokens ...\n")

        recordings.append(record(loaded, tokenizer, ids, make, max_new_tokens, moments, told))
    write_page(recordings, model or DEFAULT_MODEL, target)
    message(f"page: {out} ({format_bytes(target.stat().st_size)}); open it in a browser\n")
