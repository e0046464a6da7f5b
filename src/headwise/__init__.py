"""headwise: shrinks the KV cache of a Hugging Face language model head by head, and gives the memory back.

Names are imported from their modules at first use: importing headwise costs nothing and has no side effect.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from headwise.errors import or_nearest
from headwise.version import __version__

if TYPE_CHECKING:
    from headwise.errors import (
        CacheStateError,
        ConfigurationError,
        HeadwiseError,
        HeadwiseWarning,
        InputError,
        MismatchError,
        ModelNotFoundError,
        UnknownPolicyError,
        UnsupportedModelError,
    )
    from headwise.hosts.transformers.cache import HeadwiseCache
    from headwise.hosts.transformers.graph import DecodeGraph
    from headwise.hosts.transformers.marked import encode_marked
    from headwise.hosts.transformers.models import find_default_model, load_default_model, load_model
    from headwise.less.checkpoint import load_kernels
    from headwise.less.features import LessKernels
    from headwise.policies import (
        H2O,
        RKV,
        TOVA,
        AdaKV,
        Auto,
        Evidence,
        ExpectedAttention,
        FastGen,
        Full,
        KeepMedia,
        KeyDiff,
        KeyNorm,
        KVzip,
        LazyEviction,
        Less,
        Match,
        PeakAttention,
        Policy,
        PyramidKV,
        Quantized,
        Random,
        Rule,
        Scissorhands,
        Scored,
        SnapKV,
        StreamingLLM,
        Window,
        create_policy,
        list_policies,
        register,
    )
    from headwise.report.report import Report
    from headwise.steer.spans import Marked, Span, TokenRange
    from headwise.steer.steering import Boost, Steering, TargetShare

__all__ = [
    "H2O",
    "RKV",
    "TOVA",
    "AdaKV",
    "Auto",
    "Boost",
    "CacheStateError",
    "ConfigurationError",
    "DecodeGraph",
    "Evidence",
    "ExpectedAttention",
    "FastGen",
    "Full",
    "HeadwiseCache",
    "HeadwiseError",
    "HeadwiseWarning",
    "InputError",
    "KVzip",
    "KeepMedia",
    "KeyDiff",
    "KeyNorm",
    "LazyEviction",
    "Less",
    "LessKernels",
    "Marked",
    "Match",
    "MismatchError",
    "ModelNotFoundError",
    "PeakAttention",
    "Policy",
    "PyramidKV",
    "Quantized",
    "Random",
    "Report",
    "Rule",
    "Scissorhands",
    "Scored",
    "SnapKV",
    "Span",
    "Steering",
    "StreamingLLM",
    "TargetShare",
    "TokenRange",
    "UnknownPolicyError",
    "UnsupportedModelError",
    "Window",
    "__version__",
    "create_policy",
    "encode_marked",
    "find_default_model",
    "list_policies",
    "load_default_model",
    "load_kernels",
    "load_model",
    "register",
]

# Where each public name is defined; what is not listed here is a policy.
_HOMES = {
    "Boost": "headwise.steer.steering",
    "CacheStateError": "headwise.errors",
    "ConfigurationError": "headwise.errors",
    "DecodeGraph": "headwise.hosts.transformers.graph",
    "HeadwiseCache": "headwise.hosts.transformers.cache",
    "HeadwiseError": "headwise.errors",
    "HeadwiseWarning": "headwise.errors",
    "InputError": "headwise.errors",
    "LessKernels": "headwise.less.features",
    "Marked": "headwise.steer.spans",
    "MismatchError": "headwise.errors",
    "ModelNotFoundError": "headwise.errors",
    "Report": "headwise.report.report",
    "Span": "headwise.steer.spans",
    "Steering": "headwise.steer.steering",
    "TargetShare": "headwise.steer.steering",
    "TokenRange": "headwise.steer.spans",
    "UnknownPolicyError": "headwise.errors",
    "UnsupportedModelError": "headwise.errors",
    "encode_marked": "headwise.hosts.transformers.marked",
    "find_default_model": "headwise.hosts.transformers.models",
    "load_default_model": "headwise.hosts.transformers.models",
    "load_kernels": "headwise.less.checkpoint",
    "load_model": "headwise.hosts.transformers.models",
}


def __getattr__(name: str) -> Any:
    policies = import_module("headwise.policies")
    if name in policies.FORMER_CLASSES:
        current = policies.FORMER_CLASSES[name]
        warnings.warn(f"headwise.{name} is now headwise.{current}", DeprecationWarning, stacklevel=2)
        return getattr(policies, current)
    if name not in __all__:
        raise AttributeError(f"module 'headwise' has no attribute {name!r}{or_nearest(name, __all__)}")
    value = getattr(import_module(_HOMES.get(name, "headwise.policies")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
