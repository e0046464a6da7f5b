"""Checks: a parameter of a policy -> nothing, or an error that says what it may be."""

from __future__ import annotations

from headwise.errors import ConfigurationError, or_nearest
from headwise.policies.size import Size

# Columns are stored as 32-bit integers.
_MOST_TOKENS = 2**31 - 1


def check_size(name: str, size: Size) -> None:
    """Refuse what is neither a count of tokens nor a fraction.

    Raises:
        ConfigurationError: for a negative count, a fraction outside 0 to 1, or something that is no number.
    """
    if isinstance(size, bool) or not isinstance(size, int | float):
        raise ConfigurationError(f"{name} must be a count (int) or a fraction (float), got {size!r}")
    if isinstance(size, int) and not 0 <= size <= _MOST_TOKENS:
        raise ConfigurationError(f"{name} must be a count from 0 to {_MOST_TOKENS}, got {size}")
    if isinstance(size, float) and not 0.0 <= size <= 1.0:
        raise ConfigurationError(f"{name} must be a fraction from 0.0 to 1.0, got {size} (a count is an int)")


def check_count(name: str, count: int, least: int, *, odd: bool = False) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        ConfigurationError: naming the parameter.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < least or (odd and count % 2 == 0):
        raise ConfigurationError(f"{name} must be {'an odd' if odd else 'a'} count of {least} or more, got {count!r}")


def check_target(name: str, recovery: object, keep: Size | None) -> None:
    """Refuse anything but either a recovery or a budget.

    Raises:
        ConfigurationError: when both or none are given, or the one given is out of range.
    """
    if (recovery is None) == (keep is None):
        raise ConfigurationError(f"{name} takes a recovery, or a budget of tokens to keep, and not both")
    if keep is not None:
        check_size("keep", keep)
    elif isinstance(recovery, bool) or not isinstance(recovery, int | float):
        raise ConfigurationError(f"recovery must be a number from 0 to 1, got {recovery!r}")
    elif not 0 <= recovery <= 1:
        raise ConfigurationError(f"recovery must be from 0 to 1, got {recovery}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not among the choices.

    Raises:
        ConfigurationError: with the choices in its message.
    """
    if value not in choices:
        raise ConfigurationError(
            f"{name} must be one of {', '.join(choices)}, got {value!r}" + or_nearest(value, choices)
        )


def check_switch(name: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ConfigurationError: naming the parameter.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} must be True or False, got {value!r}")


def check_gate(value: object) -> None:
    """Refuse what is neither a switch nor the name of a folder.

    Raises:
        ConfigurationError: with what was given.
    """
    if not isinstance(value, bool | str) or value == "":
        raise ConfigurationError(f"gate must be True, False or the folder of trained gates, got {value!r}")
