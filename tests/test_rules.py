"""Rules and policies: truth tables by hand, sizes, validation, the registry."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import headwise
from headwise.errors import ConfigurationError, UnknownPolicyError
from headwise.policies.base import Rule
from headwise.policies.frequent import Frequent
from headwise.policies.punctuation import Punctuation
from headwise.policies.random import Lottery
from headwise.policies.sinks import Sinks
from headwise.policies.size import quota_tokens, window_tokens
from headwise.policies.special import Special
from headwise.policies.window import Window
from headwise.types import Kind
from models import unchecked_shapes
from rule_facts import facts


def kept(rule, tokens):
    """Positions that stay in the first head."""
    keep = rule.keep(tokens) & tokens.valid
    return sorted(tokens.position[0, 0][keep[0, 0]].tolist())


S, P, O = int(Kind.SPECIAL), int(Kind.PUNCTUATION), int(Kind.ORDINARY)  # noqa: E741  # short for the tables below

TRUTH = [
    (headwise.Full(), {}, [0, 1, 2, 3, 4, 5]),
    (Special(), {"kinds": [S, O, P, O, S, O]}, [0, 4]),
    (Punctuation(), {"kinds": [S, O, P, P, S, O]}, [2, 3]),
    (Sinks(2), {}, [0, 1]),
    (Sinks(0), {}, []),
    (Window(2), {}, [4, 5]),
    (Window(0), {}, []),
    (Window(99), {}, [0, 1, 2, 3, 4, 5]),
    (Window(0.3), {"prompt": 6}, [4, 5]),
    (Window(0.3, of="prompt"), {"prompt": 10}, [3, 4, 5]),  # 0.3 of the prompt's 10 tokens, not of the 6 seen
    (Window(0.01), {"prompt": 10}, [5]),  # at least one
    (Window(0.0), {}, []),
    (Frequent(2), {"scores": [5, 1, 9, 1, 9, 0]}, [2, 4]),
    (Frequent(1), {"scores": [5, 1, 9, 1, 9, 0]}, [2]),  # ties go to the earlier token
    (Frequent(4), {"scores": [0, 0, 0, 0, 0, 0]}, [0, 1, 2, 3]),
    (Frequent(0), {"scores": [5, 1, 9, 1, 9, 0]}, []),
    (Frequent(0.5), {"scores": [5, 1, 9, 1, 9, 0]}, [0, 2, 4]),
    (Frequent(0.34), {"scores": [5, 1, 9, 1, 9, 0]}, [0, 2, 4]),  # 2.04, rounded up
    (Frequent(0.2, of="prompt"), {"prompt": 5, "scores": [5, 1, 9, 1, 9, 0]}, [2]),
    # Divided by 6, 5, 4, 3, 2, 1: the mass per query that could see the token.
    (Frequent(2, normalize=True), {"scores": [5, 1, 4, 1, 4, 1.5]}, [4, 5]),
    (Frequent(2, among="rest") | Window(2), {"scores": [5, 1, 4, 1, 9, 9]}, [0, 2, 4, 5]),
    (Frequent(2) | Window(2), {"scores": [5, 1, 4, 1, 9, 9]}, [4, 5]),
    (Window(1) | Sinks(1) | Special(), {"kinds": [O, O, S, O, O, O]}, [0, 2, 5]),
]


@pytest.mark.parametrize(("rule", "given", "expected"), TRUTH, ids=[f"{r}-{n}" for n, (r, _, _) in enumerate(TRUTH)])
def test_truth_table(rule, given, expected):
    assert kept(rule, facts(positions=[0, 1, 2, 3, 4, 5], **given)) == expected


@pytest.mark.parametrize(("rule", "given", "expected"), TRUTH, ids=[f"{r}-{n}" for n, (r, _, _) in enumerate(TRUTH)])
def test_rows_may_lie_in_any_order(rule, given, expected):
    order = [3, 0, 5, 1, 4, 2]
    shuffled = {name: [v[i] for i in order] if isinstance(v, list) else v for name, v in given.items()}
    assert kept(rule, facts(positions=order, **shuffled)) == expected


@pytest.mark.parametrize(("rule", "given", "expected"), TRUTH, ids=[f"{r}-{n}" for n, (r, _, _) in enumerate(TRUTH)])
def test_static_part_and_window_make_up_the_rule(rule, given, expected):
    tokens = facts(positions=[0, 1, 2, 3, 4, 5], **given)
    band = tokens.age < rule.width(tokens.prompt)
    assert torch.equal(rule.keep(tokens), rule.static(tokens) | band)


def test_rows_that_are_not_valid_take_no_place_in_the_ranking():
    tokens = facts(positions=[0, 1, 2, 3], scores=[9, 1, 5, 2], valid=[False, True, True, True])
    assert kept(Frequent(2), tokens) == [2, 3]


def test_a_window_counts_from_the_newest_token_even_when_rows_are_missing():
    assert kept(Window(4), facts(positions=[0, 2, 7, 9], seen=10)) == [7, 9]


def test_random_keeps_an_exact_count_and_differs_by_head_layer_and_seed():
    sets = set()
    for layer in range(3):
        for seed in range(3):
            tokens = facts(positions=list(range(50)), prompt=50, heads=4, layer=layer)
            keep = Lottery(0.3, seed).keep(tokens)
            assert keep.sum(-1).tolist() == [[15] * 4]
            sets |= {tuple(head.nonzero().flatten().tolist()) for head in keep[0]}
    assert len(sets) == 36


def test_random_is_a_uniform_sample():
    # Of 4000 draws of 10 in 40, every position is drawn about 1000 times: sigma is 27.
    hits = torch.zeros(40)
    for seed in range(1000):
        hits += Lottery(10, seed).keep(facts(positions=list(range(40)), heads=4))[0].sum(0)
    assert hits.min() > 1000 - 5 * 27.4
    assert hits.max() < 1000 + 5 * 27.4


def test_random_keeps_the_same_tokens_as_more_come():
    early = set(kept(Lottery(5, 1), facts(positions=list(range(20)))))
    late = set(kept(Lottery(5, 1), facts(positions=list(range(60)))))
    assert all(p >= 20 for p in late - early)


@pytest.mark.parametrize(
    ("size", "length", "window", "quota"),
    [(0, 7, 0, 0), (3, 7, 3, 3), (0.0, 7, 0, 0), (1.0, 7, 7, 7), (0.3, 7, 2, 3), (0.07, 100, 7, 7), (0.01, 7, 1, 1)],
)
def test_sizes(size, length, window, quota):
    assert window_tokens(size, torch.tensor([length])).tolist() == [window]
    assert quota_tokens(size, torch.tensor([length])).tolist() == [quota]


NONSENSE = [
    "Window(1.5)",
    "Window(-1)",
    "Window(True)",
    "Window('8')",
    "Sinks(-1)",
    "Sinks(1.0)",
    "Frequent(0.3, of='moon')",
    "Frequent(0.3, among='few')",
    "FastGen(1.01)",
    "FastGen(-0.1)",
    "FastGen('much')",
    "FastGen(0.9, local=2.0)",
    "FastGen(0.9, rows='best')",
    "FastGen(0.9, last_rows=0)",
    "FastGen(0.9, fold='max')",
    "FastGen(0.9, criterion='l2')",
    "FastGen(0.9, profile_rows=0)",
    "FastGen(0.9, ladder=('special',))",
    "FastGen(0.9, ladder=('special', 'speciall', 'full'))",
    "FastGen(0.9, ladder=())",
    "FastGen(0.9, normalize='no')",
    "Window(10**30)",
    "H2O(heavy=0.2, recent=-2)",
    "StreamingLLM(window=8, sinks=-1)",
    "Random(keep=1.1)",
    "Random(keep=0.5, seed=0.5)",
    "create_policy('window', size='big')",
]


@pytest.fixture(scope="module")
def refusals():
    """What each line of NONSENSE raises, as a user sees it: without the type checks that pytest adds."""
    program = f"""
import json
from headwise import *
from headwise.policies.frequent import Frequent
from headwise.policies.sinks import Sinks
answers = {{}}
for line in {NONSENSE!r}:
    try:
        answers[line] = ["nothing", str(eval(line))]
    except Exception as error:
        answers[line] = [type(error).__name__, str(error)]
print(json.dumps(answers))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("line", NONSENSE)
def test_what_makes_no_sense_is_refused_in_one_line(line, refusals):
    raised, message = refusals[line]
    assert raised == "ConfigurationError"
    assert message
    assert "\n" not in message


def test_the_paper_ladder():
    rungs = headwise.FastGen(0.9).rungs
    assert [rung.label for rung in rungs] == [
        "special",
        "special+punctuation",
        "special+punctuation+frequent",
        "special+punctuation+frequent+local",
        "full",
    ]
    tokens = facts(
        positions=list(range(10)), kinds=[S, O, O, P, O, O, O, O, O, O], scores=[0, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    )
    assert [kept(rung, tokens) for rung in rungs] == [
        [0],
        [0, 3],
        [0, 1, 2, 3],  # 0.3 of 10: three heavy hitters, one of which is punctuation
        [0, 1, 2, 3, 7, 8, 9],
        list(range(10)),
    ]


def test_sinks_join_every_compressed_rung():
    rungs = headwise.FastGen(0.9, sinks=2).rungs
    tokens = facts(positions=list(range(10)), kinds=[O] * 10, scores=[0.0] * 10)
    assert all({0, 1} <= set(kept(rung, tokens)) for rung in rungs)
    assert rungs[0].label == "sinks+special"


def test_a_policy_prints_what_was_given():
    assert str(headwise.FastGen(0.95, sinks=4)) == "FastGen(recovery=0.95, sinks=4)"
    assert str(headwise.Full()) == "Full()"
    assert str(Window(8) | Sinks(2)) == "Window(size=8) | Sinks(count=2)"


def test_the_registry_finds_every_file():
    known = headwise.list_policies()
    assert {"fastgen", "full", "h2o", "random", "streamingllm", "window"} <= set(known)
    assert list(known) == sorted(known)
    for policy in known.values():
        assert policy.__doc__


def test_an_unknown_policy_names_the_nearest():
    with pytest.raises(UnknownPolicyError, match=re.escape("did you mean fastgen")):
        headwise.create_policy("fastgem", recovery=0.9)


def test_parameters_are_checked_by_name():
    with pytest.raises(ConfigurationError, match="takes a recovery, or a budget"):
        headwise.create_policy("fastgen")
    with pytest.raises(ConfigurationError, match=r"no parameter 'recall'.*recovery"):
        headwise.create_policy("fastgen", recall=0.9)
    assert headwise.create_policy("h2o", heavy=3, recent=4) == headwise.H2O(3, 4)


def test_a_name_cannot_be_taken_twice():
    with pytest.raises(ConfigurationError, match="registered twice"):

        @headwise.register("full")
        class Again(Rule):
            pass


@pytest.mark.parametrize("of", ["seen", "prompt"])
@pytest.mark.parametrize(
    "policy",
    [
        headwise.Window(0.2),
        headwise.StreamingLLM(0.2, within=True),
        headwise.H2O(heavy=0.1, recent=0.1),
        headwise.Random(keep=0.2),
        Frequent(0.2),
    ],
    ids=str,
)
def test_a_fraction_is_of_all_tokens_seen_or_of_the_prompt(policy, of):
    (rule,) = replace(policy, of=of).rungs
    tokens = facts(positions=list(range(60)), prompt=40, scores=torch.arange(60).flip(0).tolist())
    assert int(rule.keep(tokens).sum()) == {"seen": 12, "prompt": 8}[of]
    with unchecked_shapes(), pytest.raises(ConfigurationError, match="of must be one of seen, prompt"):
        replace(policy, of="all").rungs  # noqa: B018  # made when asked for
