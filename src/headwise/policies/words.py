"""Words: a policy as words, such as `h2o:heavy=0.25,recent=0.25` -> the policy; and back to plain values for JSON.

Policies are imported when one is asked for: the command line answers `--help` without torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from headwise.errors import ConfigurationError, or_nearest

if TYPE_CHECKING:
    from headwise.policies.base import Policy
    from headwise.policies.less import Less
    from headwise.policies.match import Match
    from headwise.policies.quantized import Quantized

DEFAULT_RECOVERY = 0.95

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

# Token counts end up in 64-bit tensors.
_LARGEST = 2**63 - 1


def parse_policy(spec: str, *, budgeted: bool = False) -> Policy:
    """The policy that `NAME` or `NAME:PARAMETER=VALUE,...` stands for; recovery is 0.95 unless it or a budget is given.

    A value may hold commas itself: in `fastgen:ladder=special,full,local=8` what has no sign continues the ladder.
    Behind it, `+int8`, `+int4` or `+k8v4` stores older rows in so many bits (`headwise.Quantized`), and `+less` or
    `+less=FOLDER` lets what is evicted be remembered (`headwise.Less`), and `+match` or `+match:PARAMETER=VALUE,...`
    refits the rows that stay (`headwise.Match`).

    Args:
        budgeted: whether a budget is going to replace the sizes, which then need not be given.

    Raises:
        UnknownPolicyError: when there is none of that name; the message names the nearest.
        ConfigurationError: for an unknown, missing, repeated or unreadable parameter, or one out of range.
    """
    spec, *additions = re.split(r"\+(?=less|int|k|match)", spec)
    name, colon, rest = spec.partition(":")
    settings: list[str] = []
    for part in rest.split(",") if colon else ():
        if settings and "=" not in part:
            settings[-1] += f",{part}"
        else:
            settings.append(part)
    policy = build_policy(name.strip(), None, settings, written="parameter", budgeted=budgeted)
    for addition in additions:
        policy = _with(policy, addition.strip())
    return policy


def remembering(policy: Policy, folder: str = "") -> Less:
    """The policy with LESS, and the kernels in that folder or those that come with headwise."""
    from headwise.policies.less import Less

    return Less(policy, folder or None)


def matched(policy: Policy, settings: Sequence[str] = ()) -> Match:
    """The policy with rows refitted, with every NAME=VALUE applied.

    Raises:
        ConfigurationError: when it goes on evicting; for an unknown, repeated or unreadable parameter, or one out of
            range.
    """
    from headwise.policies.match import Match

    accepted = _parameters(Match)
    accepted.pop("policy")
    given: dict[str, Any] = {}
    _add(given, settings, accepted, "+match:")
    unknown = given.keys() - accepted.keys()
    if unknown:
        raise ConfigurationError(
            f"match has no parameter {min(unknown)!r}; it has: {', '.join(accepted)}"
            + or_nearest(min(unknown), accepted)
        )
    return Match(policy, **given)


def _with(policy: Policy, addition: str) -> Policy:
    """The policy with what stands behind a plus sign."""
    name, colon, settings = addition.partition(":")
    if name == "match":
        return matched(policy, settings.split(",") if colon else ())
    word, equals, folder = addition.partition("=")
    if word == "less":
        return remembering(policy, folder.strip())
    if equals or word[:1] not in ("i", "k"):
        raise ConfigurationError(
            f"behind a policy stands +less, +less=FOLDER, +match, +match:PARAMETER=VALUE or +BITS, got '+{addition}'"
        )
    return in_bits(policy, word)


def in_bits(policy: Policy, text: str) -> Quantized:
    """The policy with older rows in so many bits: int8, int4, or apart for keys and values, such as k8v4.

    Raises:
        ConfigurationError: when the text is none of those, or the policy chooses bits itself.
    """
    from headwise.policies.quantized import quantized

    return quantized(policy, text)


def build_policy(
    name: str,
    recovery: float | None = None,
    settings: Sequence[str] = (),
    written: str = "--set",
    *,
    budgeted: bool = False,
) -> Policy:
    """The policy of that name, with the recovery and every NAME=VALUE applied.

    Args:
        written: what people write before a NAME=VALUE; complaints use it.
        budgeted: whether a budget is going to replace the sizes, which then need not be given.

    Raises:
        UnknownPolicyError: when there is none; the message names the nearest.
        ConfigurationError: for an unknown, missing, repeated or unreadable parameter, or one out of range.
    """
    from headwise.policies.registry import create_policy, current_name, list_policies

    name = current_name(name)
    known = list_policies().get(name)
    accepted = _parameters(known) if known is not None else {}
    given: dict[str, Any] = {} if recovery is None else {"recovery": recovery}
    _add(given, settings, accepted, written)
    if "recovery" in accepted and not given.keys() & {"recovery", "keep", "ratio", "bytes"}:
        given["recovery"] = DEFAULT_RECOVERY
    missing = [n for n, parameter in accepted.items() if parameter.default is MISSING and n not in given]
    if budgeted:
        given |= dict.fromkeys(missing, 1.0)
    elif missing and all(parameter in accepted for parameter in given):
        wanted = " ".join(f"{written} {parameter}=VALUE" for parameter in missing)
        raise ConfigurationError(f"policy {name!r} needs {wanted}")
    return create_policy(name, **given)


@dataclass(frozen=True)
class _Parameter:
    """Type and default of a policy's parameter."""

    hint: Any
    default: object


def _parameters(policy: type[Policy]) -> dict[str, _Parameter]:
    """What a policy can be told, by name."""
    from headwise.policies.base import parameter_fields

    hints = get_type_hints(policy)
    return {
        field.name: _Parameter(hints[field.name], field.default) for field in parameter_fields(policy) if field.init
    }


def _add(given: dict[str, Any], settings: Sequence[str], accepted: dict[str, _Parameter], written: str) -> None:
    """Put the value of every NAME=VALUE into `given`; a name that is not accepted keeps its text."""
    for setting in settings:
        name, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not name or not text:
            raise ConfigurationError(f"{written} takes NAME=VALUE, such as window=256, got {setting!r}")
        if name in given:
            raise ConfigurationError(f"parameter {name!r} is given twice")
        given[name] = _read(f"{written} {setting}", text, accepted[name].hint if name in accepted else str)


def read_budget(text: str) -> int | float | str:
    """Tokens per KV head ("512"), a fraction of the prompt ("0.25"), or bytes ("64MiB"), which stay text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def describe_policy(policy: Policy) -> dict[str, Any]:
    """Name and parameters as JSON can hold them."""
    return {"name": policy.name, "parameters": {name: plain(value) for name, value in policy.parameters().items()}}


def policy_words(policy: Policy, without: Sequence[str] = ()) -> str:
    """The policy as `parse_policy` reads it, without what is left at its default, and without those parameters.

    Raises:
        ConfigurationError: for a parameter that has no words, such as a policy with parameters of its own.
    """
    from headwise.policies.base import parameter_fields

    said = []
    for field in parameter_fields(type(policy)):
        value = getattr(policy, field.name)
        if field.name in without or value == field.default:
            continue
        if not isinstance(value, bool | int | float | str):
            raise ConfigurationError(f"{policy}: {field.name} cannot be said in words")
        said.append(f"{field.name}={str(value).lower() if isinstance(value, bool) else value}")
    return policy.name + (f":{','.join(said)}" if said else "")


def plain(value: object) -> Any:
    """A parameter's value as JSON can hold it: rules become their labels."""
    from headwise.policies.base import Policy, Rule

    if isinstance(value, Rule):
        return value.label
    if isinstance(value, Policy):
        return describe_policy(value)
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _read(setting: str, text: str, hint: Any) -> object:
    """The value that a parameter of that type takes."""
    from headwise.policies.checks import check_choice

    if get_origin(hint) is Literal:
        check_choice(f"{setting}: the value", text, get_args(hint))
        return text
    if get_origin(hint) is tuple:
        return tuple(part.strip() for part in text.split(","))
    types = get_args(hint) or (hint,)
    if bool in types:
        if text.lower() in _WORDS:
            return _WORDS[text.lower()]
        if str not in types:
            raise ConfigurationError(f"{setting}: expected true or false")
    # A whole number first: 64 is a count of tokens, 64.0 would be a fraction.
    for kind in (int, float):
        if kind in types:
            try:
                value = kind(text)
            except ValueError:
                continue
            if abs(value) > _LARGEST:
                raise ConfigurationError(f"{setting}: the number is too large")
            return value
    if type(None) in types and text.lower() == "none":
        return None
    if str in types:
        return text
    raise ConfigurationError(f"{setting}: expected {'a whole number' if types == (int,) else 'a number'}")
