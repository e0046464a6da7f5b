"""Profile: a prompt -> the rule of every KV head, what each rule would have recovered, and what is kept."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

from headwise.cli import options
from headwise.cli.cache_request import read_cache_request
from headwise.cli.loading import load, parse_device, parse_dtype
from headwise.cli.prompt import check_fit, encode, read_prompt
from headwise.cli.report_output import (
    describe_layers,
    describe_report,
    heads_table,
    is_chosen,
    rungs_of,
    summary_table,
)
from headwise.cli.tables import message, output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headwise.hosts.transformers.cache import HeadwiseCache
    from headwise.policies import Policy
    from headwise.report.report import Report
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
    match: options.Match = False,
    model: options.Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    kernel: options.Kernel = "auto",
    cache_dtype: options.CacheDtype = "auto",
    json_output: options.Json = False,
    png: options.Png = None,
) -> None:
    """Profile a prompt: which rule every KV head gets, and what every rule recovers of its attention."""
    from headwise.report.picture import check_target, save_map

    request = read_cache_request(
        policy, recovery, settings, budget, bits, less, less_kernels, match, kernel, cache_dtype
    )
    text = read_prompt(prompt, file)
    if png is not None:
        check_target(png)
    where = parse_dtype(dtype), parse_device(device)
    loaded, tokenizer = load(model, *where)
    ids = encode(tokenizer, text, raw=raw)
    check_fit(loaded, ids.shape[-1])
    cache = request.make(loaded, tokenizer)
    _read(loaded, ids, cache)
    report = cache.report()
    if png is not None:
        save_map(report, png)
    if json_output:
        output().out(json.dumps(_to_dict(cache.policy, report), indent=2))
        return
    _show(report)
    if png is not None:
        message(f"picture: {png}\n")


def _read(model: PreTrainedModel, ids: Tensor, cache: HeadwiseCache) -> None:
    """One forward pass; of the logits, which nobody reads, only the last are computed where the model can."""
    import torch

    ids = ids.to(model.device)
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True, **few)


def _to_dict(policy: Policy, report: Report) -> dict[str, Any]:
    return {
        "prompt_tokens": report.seen_tokens,
        **describe_report(policy, report),
        "sampled": report.sampled,
        "seconds": {"profile": report.profile_seconds, "compact": report.compact_seconds},
        "rungs": list(rungs_of(report)),
        "layers": describe_layers(report),
    }


def _show(report: Report) -> None:
    console = output()
    console.print(summary_table(report))
    if is_chosen(report):
        console.print("\nThe numbered columns are the shares of attention that the rules recover:")
        for index, rung in enumerate(rungs_of(report)):
            console.print(f"  {index + 1}  {rung}")
    console.print(heads_table(report))
