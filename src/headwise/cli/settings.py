"""Settings: a policy's name and parameters as words -> the policy; and back to plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from headwise.errors import ConfigurationError

if TYPE_CHECKING:
    from headwise.policies import Policy

DEFAULT_RECOVERY = 0.95

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

# Token counts end up in 64-bit tensors.
_LARGEST = 2**63 - 1


def build_policy(name: str, recovery: float | None = None, settings: Sequence[str] = ()) -> Policy:
    """The policy of that name, with `--recovery` and every `--set NAME=VALUE` applied.

    Raises:
        UnknownPolicyError: when there is none; the message names the nearest.
        ConfigurationError: for an unknown, missing, repeated or unreadable parameter, or one out of range.
    """
    from headwise.policies import create_policy, list_policies

    known = list_policies().get(name)
    hints = get_type_hints(known) if known is not None else {}
    accepted = {field.name: field for field in fields(known) if field.init} if known is not None else {}  # type: ignore[arg-type]  # policies are dataclasses
    given: dict[str, object] = {} if recovery is None else {"recovery": recovery}
    for setting in settings:
        parameter, equals, text = setting.partition("=")
        if not equals or not parameter.strip() or not text.strip():
            raise ConfigurationError(f"--set takes NAME=VALUE, such as window=256, got {setting!r}")
        parameter = parameter.strip()
        if parameter in given:
            raise ConfigurationError(f"parameter {parameter!r} is given twice")
        # An unknown parameter is left to `create_policy`, which says what there is.
        given[parameter] = _read(setting, text.strip(), hints[parameter]) if parameter in accepted else text
    if recovery is None and "recovery" in accepted:
        given.setdefault("recovery", DEFAULT_RECOVERY)
    missing = [n for n, field in accepted.items() if field.default is MISSING and n not in given]
    if missing and all(parameter in accepted for parameter in given):
        wanted = " ".join(f"--set {parameter}=VALUE" for parameter in missing)
        raise ConfigurationError(f"policy {name!r} needs {wanted}")
    return create_policy(name, **given)


def describe_policy(policy: Policy) -> dict[str, Any]:
    """Name and parameters as JSON can hold them."""
    return {"name": policy.name, "parameters": {name: plain(value) for name, value in policy.parameters().items()}}


def plain(value: object) -> Any:
    """A parameter's value as JSON can hold it: rules become their labels."""
    from headwise.policies import Rule

    if isinstance(value, Rule):
        return value.label
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _read(setting: str, text: str, hint: Any) -> object:
    """The value that a parameter of that type takes."""
    from headwise.policies.base import check_choice

    if get_origin(hint) is Literal:
        check_choice(f"--set {setting}: the value", text, get_args(hint))
        return text
    if get_origin(hint) is tuple:
        return tuple(part.strip() for part in text.split(","))
    types = get_args(hint) or (hint,)
    if bool in types:
        if text.lower() not in _WORDS:
            raise ConfigurationError(f"--set {setting}: expected true or false")
        return _WORDS[text.lower()]
    # A whole number first: 64 is a count of tokens, 64.0 would be a fraction.
    for kind in (int, float):
        if kind in types:
            try:
                value = kind(text)
            except ValueError:
                continue
            if abs(value) > _LARGEST:
                raise ConfigurationError(f"--set {setting}: the number is too large")
            return value
    if str in types:
        return text
    raise ConfigurationError(f"--set {setting}: expected {'a whole number' if types == (int,) else 'a number'}")
