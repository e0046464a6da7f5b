"""Samples: the name of a kind that is made here, or a file -> contrasts, by which heads are profiled."""

from __future__ import annotations

import random
from pathlib import Path

from headwise.errors import ConfigurationError, or_nearest
from headwise.measure.contrasts import FACTS, Contrast, made_contrasts, read_contrasts
from headwise.measure.instructions import INSTRUCTIONS, made_instructions

KINDS = (*FACTS, *INSTRUCTIONS)


def contrasts_of(name: str, count: int, seed: int) -> list[Contrast]:
    """Samples of a kind that is made, or of a file of that name, as many as are asked for.

    Raises:
        InputError, ConfigurationError: when there are none or too few.
    """
    if name in INSTRUCTIONS:
        return [each.contrast() for each in made_instructions(name, count, seed)]
    if name in FACTS:
        return made_contrasts(name, count, seed)
    if not Path(name).is_file():
        raise ConfigurationError(f"{name!r} is neither a file nor one of {', '.join(KINDS)}" + or_nearest(name, KINDS))
    found = read_contrasts(Path(name))
    return random.Random(f"contrasts {seed}").sample(found, min(count, len(found)))
