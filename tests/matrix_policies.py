"""Policies of the generate() matrix, by family."""

from __future__ import annotations

from headwise import H2O, FastGen, Full, Random, StreamingLLM
from models import FAMILIES

FIXED = {
    "full": Full(),
    "streamingllm": StreamingLLM(window=8, sinks=2),
    "h2o": H2O(heavy=5, recent=6),
    "random": Random(keep=11),
}
# Rungs without heavy hitters: what a head keeps follows from the ids alone.
EXACT_LADDER = ("special", "special+punctuation", "special+punctuation+local", "full")


def policy_of(family, name):
    if name in FIXED:
        return FIXED[name]
    # Families differ in what they ask for, so that every rule is taken somewhere.
    recovery = (0.3, 0.5, 0.75)[FAMILIES.index(family) % 3]
    return FastGen(recovery, ladder=EXACT_LADDER) if name == "fastgen-exact" else FastGen(recovery + 0.1)
