"""Families of transformers, made small: what is done with each is what docs/families.md says of it."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

families = importlib.import_module("families")

PAGE = (ROOT / "docs" / "families.md").read_text()
KINDS = {"Served": "served", "Refused": "refused", "Wrong": "wrong", "Not tried": "not built"}
# Of each way to hold keys, to turn them, to mix layers, and to say no, one or a few; the command judges all.
SAMPLE = (
    *("llama", "gpt2", "phi", "stablelm", "biogpt", "bart", "opt", "gpt_neox", "glm4", "dbrx"),
    *(
        "mixtral",
        "gpt_oss",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "llama4_text",
        "modernbert-decoder",
    ),
    *("falcon_h1", "bamba", "jamba", "zamba2", "nemotron_h", "granitemoehybrid", "olmo_hybrid", "lfm2", "zaya"),
    *("qwen3_next", "qwen3_5_text"),
    *("bloom", "deepseek_v3", "diffllama", "mllama", "mamba", "mistral", "minimax", "qwen4_exp_text"),
)


def documented():
    """The page's tables: {family: verdict}."""
    found = {}
    for section in PAGE.split("\n## ")[1:]:
        title = section.splitlines()[0]
        for family, said in re.findall(r"^\| ([\w-]+) \| (.*) \|$", section, re.MULTILINE)[1:]:
            found[family] = families.Verdict(KINDS[title], said)
    return found


def test_the_page_has_every_family_and_none_that_goes_wrong():
    found = documented()
    assert set(found) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    kinds = [verdict.kind for verdict in found.values()]
    assert kinds.count("wrong") == 0
    assert kinds.count("served") >= 110
    assert kinds.count("not built") <= 8
    assert families.counts(found).capitalize() + "." in PAGE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", SAMPLE)
def test_what_is_done_with_a_family_is_what_the_page_says(family):
    assert families.verdict_of(family) == documented()[family]
