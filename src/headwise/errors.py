"""Errors: what went wrong -> one line that says what was given, what was expected and what to do.

HeadwiseError
├── ConfigurationError      a policy, rule or option cannot be what was asked for
│   └── UnknownPolicyError  no policy of that name; the message lists the nearest
├── InputError              a prompt, file or tensor cannot be used
│   └── FileWriteError      a file cannot be written; also an OSError
├── UnsupportedModelError   the model has nothing to compress, or no way in for a cache
├── CacheStateError         the cache cannot do this in the state it is in
├── MismatchError           a cache, file or model does not belong to the other
└── ModelNotFoundError      a model could not be found or fetched

HeadwiseWarning             something works, but perhaps not as meant
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HeadwiseError(Exception):
    """Base of every error that headwise raises on purpose."""


class ConfigurationError(HeadwiseError, ValueError):
    """A policy, rule or option cannot be what was asked for."""


class UnknownPolicyError(ConfigurationError):
    """No policy is registered under that name."""


class InputError(HeadwiseError, ValueError):
    """A prompt, file or tensor cannot be used."""


class FileWriteError(InputError, OSError):
    """A file cannot be written: no room, no permission, or something is in its place."""


class UnsupportedModelError(HeadwiseError):
    """The model has nothing to compress, or does not take a cache through the attention interface."""


class CacheStateError(HeadwiseError, RuntimeError):
    """The cache cannot do this in the state it is in."""


class MismatchError(HeadwiseError, ValueError):
    """A cache, file or model does not belong to the other."""


class ModelNotFoundError(HeadwiseError, OSError):
    """A model could not be found or fetched."""


class HeadwiseWarning(UserWarning):
    """Something works, but perhaps not as meant."""


def or_nearest(name: object, known: Iterable[str]) -> str:
    """What an error about an unknown name ends with: the nearest that there is, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
