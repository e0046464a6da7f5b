"""Options: what a request says, or the engine for all of them -> the policy, and how much of the prompt stays."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from headwise.errors import ConfigurationError
from headwise.policies.base import Policy
from headwise.policies.pyramidkv import PyramidKV
from headwise.policies.words import parse_policy
from headwise.policies.wrapper import Wrapper

# Of a request: one key with both, where values may be objects; over HTTP they are numbers and texts.
KEY, POLICY, RATIO = "headwise", "headwise_policy", "headwise_ratio"
OFF = "off"
# Beside them, where something is measured: tokens that are to be written (`forced.py`).
FORCED = "forced_ids"

# Of a policy's windows, strides and the like: anybody may ask a server for them.
_MOST = 65_536

# For engines: folder of the gates that predict what a repetition would find, in place of those that come with headwise.
GATES = "HEADWISE_VLLM_GATES"

# 0.07 * 100 is 7.000000000000001 in floating point, and must not become 8 blocks.
_FLOAT_NOISE = 1e-9


@dataclass(frozen=True)
class Options:
    """How a request is compressed.

    Args:
        policy: in words, without its size, such as `adakv:over=snapkv`.
        ratio: of the blocks that a prompt fills, above 0 and at most 1, how many stay.

    Raises:
        ConfigurationError: when there is no such policy, the ratio is out of range, or the policy cannot be served.
    """

    policy: str = "adakv:over=snapkv"
    ratio: int | float = 0.25

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio <= 1:
            raise ConfigurationError(f"{KEY}: ratio must be above 0 and at most 1, got {self.ratio!r}")
        if not isinstance(self.policy, str):
            raise ConfigurationError(f"{KEY}: policy must be a text such as 'snapkv', got {self.policy!r}")
        self.keeping(1)

    @property
    def name(self) -> str:
        """The policy's, without its parameters, of which a client may think up any number."""
        return self.policy.partition(":")[0].strip()

    def keeping(self, rows: int) -> Policy:
        """The policy with room for so many rows of every KV head, as a mean over the heads of a layer."""
        return _policy(self.policy, rows)

    def blocks(self, prompt: int, block_size: int) -> tuple[int, int]:
        """Blocks that a prompt of so many tokens fills, and how many of them stay; the same where it stays whole."""
        whole = prompt // block_size
        return whole, min(whole, max(1, math.ceil(self.ratio * whole - _FLOAT_NOISE)))

    @property
    def spreads(self) -> bool:
        """Whether layers share what stays, so that none is compacted before all have read the prompt."""
        policy = self.keeping(1)
        return policy.needs_all_layers or isinstance(policy, PyramidKV)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a request has them."""
        return asdict(self)


def options_of(extra: Mapping[str, Any] | None, default: Options | None = None) -> Options | None:
    """What a request says, or what holds for all; None where it is not compressed.

    Args:
        extra: `SamplingParams.extra_args`, or over HTTP `vllm_xargs`: `headwise` with `policy` and `ratio` in it, or
            `headwise_policy` and `headwise_ratio`; `headwise` may be "off".

    Raises:
        ConfigurationError: saying what is wrong.
    """
    extra = extra or {}
    given, apart = (
        extra.get(KEY),
        {name: extra[key] for name, key in (("policy", POLICY), ("ratio", RATIO)) if key in extra},
    )
    unknown = next((key for key in extra if key.startswith(f"{KEY}_") and key not in (POLICY, RATIO)), None)
    if unknown is not None:
        raise ConfigurationError(f"a request has no {unknown!r}; it has {POLICY} and {RATIO}")
    if given is not None and apart:
        raise ConfigurationError(f"a request says {KEY} or {', '.join((POLICY, RATIO))}, not both")
    if given in (OFF, False):
        return None
    if given is None and not apart:
        return default
    if given is not None and not isinstance(given, Mapping):
        raise ConfigurationError(
            f'{KEY} is an object such as {{"policy": "snapkv", "ratio": 0.25}}, or "{OFF}"; got {given!r}'
        )
    said = apart if given is None else dict(given)
    strange = next((name for name in said if name not in ("policy", "ratio")), None)
    if strange is not None:
        raise ConfigurationError(f"{KEY} has no {strange!r}; it has policy and ratio")
    return Options(**said) if default is None else replace(default, **said)


@lru_cache(maxsize=256)
def _policy(words: str, rows: int) -> Policy:
    policy = parse_policy(words, budgeted=True)
    stated = _stated_size(words, policy)
    if stated is not None:
        raise ConfigurationError(f"{KEY}: {words!r}: how much stays is said by {RATIO}; leave {stated} out")
    if policy.selection is not None and "keep" in policy.parameters():
        # By what is given, in place of the mass to be retained.
        policy = policy.with_keep(rows)
    if "of" in policy.parameters():
        # Chosen once, at the end of the prompt.
        policy = replace(policy, of="prompt")  # type: ignore[type-var]  # policies are dataclasses
    reason = _obstacle(policy)
    if reason is not None:
        raise ConfigurationError(f"{KEY}: {words!r} cannot be served: {reason}; take adakv, snapkv or another")
    return policy.with_keep(rows)


def _stated_size(words: str, policy: Policy) -> str | None:
    """A parameter in the words that the ratio is going to replace; None where there is none."""
    before = policy.parameters()
    if "keep" not in before and type(policy).with_keep is Policy.with_keep:
        return None
    small, large = (policy.with_keep(rows).parameters() for rows in (2, 4))
    sizes = [name for name in small if small[name] != large[name] or small[name] is None is not before[name]]
    return next((name for name in sizes if re.search(rf"[:,]\s*{name}\s*=", words)), None)


def _obstacle(policy: Policy) -> str | None:
    """Why a policy cannot be served by vLLM's blocks; None where it can."""
    counts = {name: value for name, value in policy.parameters().items() if isinstance(value, int) and name != "seed"}
    large = next((name for name, value in counts.items() if value > _MOST), None)
    if large is not None:
        return f"its {large} is above {_MOST:,}, for which a server has neither room nor time"
    if isinstance(policy, Wrapper):
        return "blocks of vLLM hold rows as the model computes them, and nothing beside"
    if policy.precision is not None:
        return "it stores rows in fewer bits, and blocks of vLLM hold them as the model computes them"
    if policy.needs_repetition:
        return "the model would have to repeat the prompt; with gates it need not (kvzip:gate=true)"
    if isinstance(policy.gates, str):
        return f"a server reads gates from the folder it was started with ({GATES}); say gate=true"
    if "media" in policy.facts:
        return "it looks for images, videos and sounds"
    if policy.again is not None:
        return "it goes on choosing while text is written"
    return None
