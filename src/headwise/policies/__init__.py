"""Policies: one small file per rule or policy, found by the registry; a new one is one new file here.

Names are imported from their modules at first use, so that words for policies can be looked at without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.policies.adakv import AdaKV
    from headwise.policies.auto import Auto
    from headwise.policies.base import Policy, Rule, Union
    from headwise.policies.evidence import Evidence
    from headwise.policies.expected_attention import ExpectedAttention
    from headwise.policies.fastgen import FastGen
    from headwise.policies.full import Full
    from headwise.policies.h2o import H2O
    from headwise.policies.keep_media import KeepMedia
    from headwise.policies.keydiff import KeyDiff
    from headwise.policies.keynorm import KeyNorm
    from headwise.policies.kvzip import KVzip
    from headwise.policies.lazy_eviction import LazyEviction
    from headwise.policies.less import Less
    from headwise.policies.match import Match
    from headwise.policies.peak_attention import PeakAttention
    from headwise.policies.pyramidkv import PyramidKV
    from headwise.policies.quantized import Quantized
    from headwise.policies.random import Random
    from headwise.policies.registry import create_policy, list_policies, register
    from headwise.policies.rkv import RKV
    from headwise.policies.scissorhands import Scissorhands
    from headwise.policies.scored import Scored
    from headwise.policies.snapkv import SnapKV
    from headwise.policies.streamingllm import StreamingLLM
    from headwise.policies.tova import TOVA
    from headwise.policies.window import Window

# Where each name is defined.
HOMES = {
    "AdaKV": "adakv",
    "Auto": "auto",
    "Evidence": "evidence",
    "ExpectedAttention": "expected_attention",
    "FastGen": "fastgen",
    "Full": "full",
    "H2O": "h2o",
    "KVzip": "kvzip",
    "KeepMedia": "keep_media",
    "KeyDiff": "keydiff",
    "KeyNorm": "keynorm",
    "LazyEviction": "lazy_eviction",
    "Less": "less",
    "Match": "match",
    "PeakAttention": "peak_attention",
    "Policy": "base",
    "PyramidKV": "pyramidkv",
    "Quantized": "quantized",
    "RKV": "rkv",
    "Random": "random",
    "Rule": "base",
    "Scissorhands": "scissorhands",
    "Scored": "scored",
    "SnapKV": "snapkv",
    "StreamingLLM": "streamingllm",
    "TOVA": "tova",
    "Union": "base",
    "Window": "window",
    "create_policy": "registry",
    "list_policies": "registry",
    "register": "registry",
}

# What classes were once called, in programs and in saved caches.
FORMER_CLASSES = {"Recite": "PeakAttention"}

__all__ = [
    "H2O",
    "RKV",
    "TOVA",
    "AdaKV",
    "Auto",
    "Evidence",
    "ExpectedAttention",
    "FastGen",
    "Full",
    "KVzip",
    "KeepMedia",
    "KeyDiff",
    "KeyNorm",
    "LazyEviction",
    "Less",
    "Match",
    "PeakAttention",
    "Policy",
    "PyramidKV",
    "Quantized",
    "Random",
    "Rule",
    "Scissorhands",
    "Scored",
    "SnapKV",
    "StreamingLLM",
    "Union",
    "Window",
    "create_policy",
    "list_policies",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'headwise.policies' has no attribute {name!r}")
    value = getattr(import_module(f"headwise.policies.{HOMES[name]}"), name)
    globals()[name] = value
    return value
