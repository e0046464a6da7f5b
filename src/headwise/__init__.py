"""headwise: shrinks the KV cache of a Hugging Face language model head by head, and gives the memory back.

Names are imported from their modules at first use: importing headwise costs nothing and has no side effect.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.errors import (
        CacheStateError,
        ConfigurationError,
        HeadwiseError,
        InputError,
        MismatchError,
        ModelNotFoundError,
        UnknownPolicyError,
        UnsupportedModelError,
    )
    from headwise.hf.cache import HeadwiseCache, HeadwiseWarning
    from headwise.hf.graph import DecodeGraph
    from headwise.hf.models import load_default_model, load_model
    from headwise.less.checkpoint import load_kernels
    from headwise.less.kernels import LessKernels
    from headwise.less.policy import Less
    from headwise.policies import (
        H2O,
        TOVA,
        AdaKV,
        Auto,
        Evidence,
        ExpectedAttention,
        FastGen,
        Full,
        KeyDiff,
        KeyNorm,
        KVzip,
        Policy,
        PyramidKV,
        Random,
        Recite,
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
    from headwise.quant.policy import Quantized
    from headwise.report import Report

__version__ = "0.1.0"

__all__ = [
    "H2O",
    "TOVA",
    "AdaKV",
    "Auto",
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
    "KeyDiff",
    "KeyNorm",
    "Less",
    "LessKernels",
    "MismatchError",
    "ModelNotFoundError",
    "Policy",
    "PyramidKV",
    "Quantized",
    "Random",
    "Recite",
    "Report",
    "Rule",
    "Scissorhands",
    "Scored",
    "SnapKV",
    "StreamingLLM",
    "UnknownPolicyError",
    "UnsupportedModelError",
    "Window",
    "__version__",
    "create_policy",
    "list_policies",
    "load_default_model",
    "load_kernels",
    "load_model",
    "register",
]

# Where each public name is defined; what is not listed here is a policy.
_HOMES = {
    "CacheStateError": "headwise.errors",
    "ConfigurationError": "headwise.errors",
    "DecodeGraph": "headwise.hf.graph",
    "HeadwiseCache": "headwise.hf.cache",
    "HeadwiseError": "headwise.errors",
    "HeadwiseWarning": "headwise.hf.cache",
    "InputError": "headwise.errors",
    "Less": "headwise.less.policy",
    "LessKernels": "headwise.less.kernels",
    "MismatchError": "headwise.errors",
    "ModelNotFoundError": "headwise.errors",
    "Quantized": "headwise.quant.policy",
    "Report": "headwise.report",
    "UnknownPolicyError": "headwise.errors",
    "UnsupportedModelError": "headwise.errors",
    "load_default_model": "headwise.hf.models",
    "load_kernels": "headwise.less.checkpoint",
    "load_model": "headwise.hf.models",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'headwise' has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "headwise.policies")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
