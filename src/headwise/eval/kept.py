"""Kept: a report -> how many tokens every head keeps and by which rule, as JSON can hold it; and a report from that."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from headwise.report.layer_report import LayerReport
from headwise.report.report import Report

_SIZES = ("used_bytes", "allocated_bytes", "full_bytes")


def describe_kept(report: Report) -> dict[str, Any]:
    """Plain values of the first sequence, with every rule's name written once."""
    rungs = list(dict.fromkeys(rung for layer in report.layers for rung in layer.rungs))
    return {
        "policy": report.policy,
        "seen_tokens": report.seen_tokens,
        "transcript_bytes": report.transcript_bytes,
        "rungs": rungs,
        "layers": [_describe_layer(layer, rungs) for layer in report.layers],
    }


def rebuild_report(kept: dict[str, Any]) -> Report:
    """A report of those values, which pictures can be drawn of; times and kernels are not in it."""
    layers = [_rebuild_layer(layer, kept["rungs"]) for layer in kept["layers"]]
    return Report(kept["policy"], kept["seen_tokens"], layers, kept["transcript_bytes"], "", 0.0, 0.0)


def _describe_layer(layer: LayerReport, rungs: list[str]) -> dict[str, Any]:
    tokens = None if layer.kept_tokens is None else layer.kept_tokens[0].tolist()
    rules = None if layer.rules is None else [rungs.index(name) for name in layer.rules[0].tolist()]
    sizes = {name: getattr(layer, name) for name in _SIZES}
    return sizes | {"kept_tokens": tokens, "rules": rules}


def _rebuild_layer(layer: dict[str, Any], rungs: list[str]) -> LayerReport:
    sizes = {name: layer[name] for name in _SIZES}
    if layer["kept_tokens"] is None:
        return LayerReport(**sizes)
    rules = np.array([[rungs[rule] for rule in layer["rules"]]])
    return LayerReport(**sizes, kept_tokens=torch.tensor([layer["kept_tokens"]]), rules=rules, rungs=tuple(rungs))
