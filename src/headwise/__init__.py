"""headwise: shrinks the KV cache of a Hugging Face language model head by head, and gives the memory back."""

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
from headwise.hf.models import load_default_model, load_model
from headwise.policies import (
    H2O,
    FastGen,
    Full,
    Policy,
    Random,
    Rule,
    StreamingLLM,
    Window,
    create_policy,
    policies,
    register,
)
from headwise.report import Report

__version__ = "0.1.0"

__all__ = [
    "H2O",
    "CacheStateError",
    "ConfigurationError",
    "FastGen",
    "Full",
    "HeadwiseCache",
    "HeadwiseError",
    "HeadwiseWarning",
    "InputError",
    "MismatchError",
    "ModelNotFoundError",
    "Policy",
    "Random",
    "Report",
    "Rule",
    "StreamingLLM",
    "UnknownPolicyError",
    "UnsupportedModelError",
    "Window",
    "__version__",
    "create_policy",
    "load_default_model",
    "load_model",
    "policies",
    "register",
]
