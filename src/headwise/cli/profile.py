"""Profile: a prompt -> the rule of every KV head, what each rule would have recovered, and what is kept."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from headwise.cli import options
from headwise.cli.loading import check_kernel, load, parse_device, parse_dtype, with_additions
from headwise.cli.prompt import check_fit, encode, read_prompt
from headwise.cli.tables import add_memory, add_rules, message, output, plain_table
from headwise.policies.words import build_policy, describe_policy, read_budget
from headwise.report.picture import check_target, save_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise import HeadwiseCache
    from headwise.policies import Policy
    from headwise.report.report import LayerReport, Report
    from headwise.types import Tensor


def profile(
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
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    kernel: options.Kernel = "auto",
    cache_dtype: options.CacheDtype = "auto",
    json_output: options.Json = False,
    png: options.Png = None,
) -> None:
    """Profile a prompt: which rule every KV head gets, and what every rule recovers of its attention."""
    chosen = build_policy(policy, recovery, settings or (), budgeted=budget is not None)
    chosen = with_additions(chosen, bits, less, less_kernels)
    room = None if budget is None else read_budget(budget)
    text = read_prompt(prompt, file)
    if png is not None:
        check_target(png)
    where = parse_dtype(dtype), parse_device(device)
    check_kernel(kernel)
    rows_dtype = parse_dtype(cache_dtype)
    loaded, tokenizer = load(model, *where)
    ids = encode(tokenizer, text, raw=raw)
    check_fit(loaded, ids.shape[-1])

    from headwise import HeadwiseCache

    cache = HeadwiseCache(loaded, chosen, tokenizer=tokenizer, kernel=kernel, budget=room, cache_dtype=rows_dtype)
    _read_prompt(loaded, ids, cache)
    report = cache.report()
    if png is not None:
        save_map(report, png)
    if json_output:
        output().out(json.dumps(_to_dict(cache.policy, report), indent=2))
        return
    _show(report)
    if png is not None:
        message(f"picture: {png}\n")


def _read_prompt(model: PreTrainedModel, ids: Tensor, cache: HeadwiseCache) -> None:
    """One forward pass; of the logits, which nobody reads, only the last are computed where the model can."""
    import torch

    ids = ids.to(model.device)
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True, **few)


def _to_dict(policy: Policy, report: Report) -> dict[str, Any]:
    return {
        "prompt_tokens": report.seen_tokens,
        "policy": describe_policy(policy),
        "memory": {
            "used_bytes": report.used_bytes,
            "allocated_bytes": report.allocated_bytes,
            "full_bytes": report.full_bytes,
            **report.remembered,
        },
        "kept_ratio": report.kept_ratio,
        "rules": report.rule_counts,
        "sampled": report.sampled,
        "kernel": report.kernel,
        "seconds": {"profile": report.profile_seconds, "compact": report.compact_seconds},
        "rungs": list(_rungs(report)),
        "layers": [
            {"layer": index, "heads": None if layer.rules is None else _heads(layer)}
            for index, layer in enumerate(report.layers)
        ],
    }


def _heads(layer: LayerReport) -> list[dict[str, Any]]:
    """Of every head its rule, its kept tokens, and the recovered mass of every rung, or None."""
    assert layer.rules is not None and layer.kept_tokens is not None
    return [
        {
            "head": head,
            "rule": str(rule),
            "kept_tokens": int(layer.kept_tokens[0, head]),
            "recovered": None if layer.recovered is None else layer.recovered[:, 0, head].tolist(),
        }
        for head, rule in enumerate(layer.rules[0])
    ]


def _rungs(report: Report) -> tuple[str, ...]:
    return next((layer.rungs for layer in report.layers if layer.rungs), ())


def _show(report: Report) -> None:
    from headwise.units import format_bytes

    rungs = _rungs(report)
    summary = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    summary.add_column(style="dim", no_wrap=True)
    summary.add_column()
    summary.add_row("policy", report.policy)
    summary.add_row("prompt", f"{report.seen_tokens:,} tokens")
    summary.add_row("kept", f"{report.kept_ratio:.1%} of all rows")
    summary.add_row(
        "memory held", f"{format_bytes(report.allocated_bytes)} of {format_bytes(report.full_bytes)} for a full cache"
    )
    add_memory(summary, report)
    add_rules(summary, report)
    console = output()
    console.print(summary)
    table = plain_table("layer", "head", "rule", "kept")
    chosen = any(layer.recovered is not None for layer in report.layers)
    columns = range(len(rungs)) if chosen else range(0)
    for index in columns:
        table.add_column(str(index + 1), justify="right", no_wrap=True)
    for column, justify in ((0, "right"), (1, "right"), (3, "right")):
        table.columns[column].justify = justify  # type: ignore[assignment]  # a literal in rich's types
    table.columns[2].overflow, table.columns[2].no_wrap = "ellipsis", True
    table.columns[3].no_wrap = True
    for number, layer in enumerate(report.layers):
        if layer.rules is None:
            table.add_row(str(number), "", Text("not compressed", style="dim"))
            continue
        for head in _heads(layer):
            table.add_row(*_row(number, head, rungs, report.seen_tokens))
        if number % 5 == 4:
            table.add_section()
    if chosen:
        console.print("\nThe numbered columns are the shares of attention that the rules recover:")
        for index, rung in enumerate(rungs):
            console.print(f"  {index + 1}  {rung}")
    console.print(table)


def _row(layer: int, head: dict[str, Any], rungs: tuple[str, ...], seen: int) -> list[Text | str]:
    taken = rungs.index(head["rule"])
    kept = head["kept_tokens"]
    cells: list[Text | str] = [
        str(layer) if head["head"] == 0 else "",
        str(head["head"]),
        head["rule"],
        f"{kept:,} ({kept / seen:.0%})",
    ]
    for index, mass in enumerate(head["recovered"] or ()):
        # Three digits could round what just missed the target up to it.
        text = f"{int(mass * 1000) / 1000:.3f}"
        cells.append(Text(f"*{text}", style="bold green") if index == taken else Text(text, style="dim"))
    return cells
