"""lm-evaluation-harness with a compressed cache, where it is installed: pip install 'headwise[lm-eval]'."""

from __future__ import annotations

import json
import sys
import tomllib
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

import tiny
from headwise import HeadwiseCache, StreamingLLM
from headwise.cli.main import main
from headwise.errors import ConfigurationError, InputError, UnknownPolicyError
from headwise.policies.words import describe_policy

with warnings.catch_warnings():
    # Its dependencies are not ours to keep free of warnings.
    warnings.simplefilter("ignore")
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from headwise.eval.lm_harness import HeadwiseLM

pytestmark = pytest.mark.filterwarnings("ignore")

EVICTING = {"policy": "streamingllm", "window": 4, "sinks": 1, "kernel": "reference", "evict_every": 3}
POLICY = StreamingLLM(window=4, sinks=1)

CHOICES = [
    {"question": "w10 w11 w12 w13 w14 w15 w16 w17 w18 w19", "choices": ["w20", "w21 w22", "w23"], "answer": 1},
    {"question": "w30 w31 w32 w33 w34 w35 w36 w37 w38", "choices": ["w40", "w41", "w42 w43 w44"], "answer": 0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def make(folder):
    def made(kind=HeadwiseLM, **options):
        return kind(pretrained=str(folder), device="cpu", **options)

    return made


@pytest.fixture(scope="module")
def plain(make):
    return make(HFLM)


def requests(kind, *arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def words(first, last):
    return " ".join(f"w{number}" for number in range(first, last))


PAIRS = requests(
    "loglikelihood",
    (words(10, 40), " w41"),
    (words(10, 40), " w42"),
    (words(10, 40), " w43 w44 w45 w46 w47"),
    (words(50, 60), " w61 w62"),
    ("", "w70 w71"),
)
TEXTS = requests("loglikelihood_rolling", (words(10, 60),), (words(20, 24),))


def test_harness_finds_the_model_by_name():
    assert get_model("headwise") is HeadwiseLM
    assert get_model("hf") is HFLM


def test_later_releases_find_it_by_themselves():
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    points = [EntryPoint(name, place, "lm_eval.models") for name, place in declared["lm_eval.models"].items()]
    assert {point.name: point.load() for point in points} == {"headwise": HeadwiseLM}


def test_the_full_cache_scores_what_the_harness_scores(make, plain):
    full = make(policy="full")
    for answer, expected in zip(full.loglikelihood(PAIRS), plain.loglikelihood(PAIRS), strict=True):
        assert answer == (pytest.approx(expected[0], abs=1e-4), expected[1])
    expected = plain.loglikelihood_rolling(TEXTS)
    assert full.loglikelihood_rolling(TEXTS) == [pytest.approx(each, abs=1e-3) for each in expected]


def test_windows_of_a_long_text_add_up(make):
    for options in ({"policy": "full"}, EVICTING):
        whole, cut = (make(**options, max_length=length).loglikelihood_rolling(TEXTS) for length in (512, 20))
        assert len(cut) == 2
        # The short text fits into one window; the long one loses context, and its sum changes.
        assert cut[1] == pytest.approx(whole[1], abs=1e-4)
        assert cut[0] != pytest.approx(whole[0], abs=1e-2)
    expected = make(HFLM, max_length=20).loglikelihood_rolling(TEXTS)
    assert make(policy="full", max_length=20).loglikelihood_rolling(TEXTS) == pytest.approx(expected, abs=1e-3)


def by_hand(lm, context, continuation):
    context, continuation = lm._encode_pair(context, continuation)
    cache = HeadwiseCache(
        lm.model, POLICY, tokenizer=lm.tokenizer, prompt_tokens=len(context) - 1, kernel="reference", evict_every=3
    )
    total = 0.0
    with torch.inference_mode():
        lm.model(input_ids=torch.tensor([context[:-1]]), past_key_values=cache)
        for token, target in zip([context[-1], *continuation[:-1]], continuation, strict=True):
            logits = lm.model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
            total += float(logits.log_softmax(dim=-1)[target])
    return total


def test_an_evicting_cache_scores_on_what_it_keeps(make, plain):
    lm = make(**EVICTING)
    found, full = lm.loglikelihood(PAIRS), plain.loglikelihood(PAIRS)
    for request, (answer, _), (uncompressed, _) in zip(PAIRS[:4], found, full, strict=False):
        assert answer == pytest.approx(by_hand(lm, *request.args), abs=1e-4)
        assert abs(answer - uncompressed) > 1e-3
    assert lm.loglikelihood_rolling(TEXTS)[0] != pytest.approx(plain.loglikelihood_rolling(TEXTS)[0], abs=1e-2)


def test_a_text_is_read_up_to_the_share_asked_for(make):
    def kept(share):
        lm = make(**EVICTING, rolling_prompt=share)
        lm.loglikelihood_rolling(TEXTS[:1])
        return lm.get_model_info()["headwise"]["kept_ratio"]

    # 50 inputs: of 25, 10 or all, five are kept.
    assert [kept(share) for share in (0.5, 10, 1.0)] == [pytest.approx(5 / 25), 5 / 10, 5 / 50]


def test_texts_are_generated_with_a_compressed_cache(make, plain):
    arguments = [(words(10, 10 + length), {"until": ["w99 w99"], "max_gen_toks": 12}) for length in (30, 22, 25)]
    prompts = requests("generate_until", *arguments)
    assert make(policy="full").generate_until(prompts) == plain.generate_until(prompts)
    lm = make(**EVICTING)
    alone = lm.generate_until(prompts)
    assert alone != plain.generate_until(prompts)
    for text, (prompt, _) in zip(alone, arguments, strict=True):
        ids = torch.tensor([lm.tok_encode(prompt)])
        cache = HeadwiseCache(lm.model, POLICY, kernel="reference", evict_every=3)
        new = lm.model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
        assert text == lm.tok_decode(new.tolist())
    # In batches with padding on the left, too.
    assert make(**EVICTING, batch_size=3).generate_until(prompts) == alone


def test_results_say_what_was_kept(make):
    lm = make(**EVICTING)
    assert "caches" not in lm.get_model_info()["headwise"]
    lm.loglikelihood(PAIRS[:4])
    told = lm.get_model_info()["headwise"]
    assert told.items() >= describe_policy(POLICY).items()
    assert (told["evict_every"], told["caches"]) == (3, 2)
    assert told["kept_ratio"] == pytest.approx((5 / 29 + 5 / 9) / 2)
    assert 0 < told["used_bytes"] < told["full_bytes"]
    json.dumps(told)


def task(tmp_path):
    path = tmp_path / "choices.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in CHOICES))
    return {
        "task": "tiny_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }


def test_a_task_runs_from_its_configuration_to_its_result(make, tmp_path):
    lm = make(**EVICTING)
    # Without looking through all of the tasks that the harness comes with.
    manager = TaskManager(include_defaults=False)
    results = lm_eval.simple_evaluate(model=lm, tasks=[task(tmp_path)], bootstrap_iters=0, task_manager=manager)
    expected = []
    for document in CHOICES:
        scores = [by_hand(lm, document["question"], f" {choice}") for choice in document["choices"]]
        expected.append(float(max(range(3), key=scores.__getitem__) == document["answer"]))
    assert results["results"]["tiny_choices"]["acc,none"] == pytest.approx(sum(expected) / 2)
    answers = [float(answer[0][0]) for answer in results["samples"]["tiny_choices"][0]["resps"]]
    assert answers == [
        pytest.approx(by_hand(lm, CHOICES[0]["question"], f" {choice}"), abs=1e-4) for choice in CHOICES[0]["choices"]
    ]


def test_the_command_line_is_the_harness_s_own(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["headwise"])
    (tmp_path / "tiny_choices.yaml").write_text(json.dumps(task(tmp_path)))
    model_args = f"pretrained={folder},policy=streamingllm,window=4,sinks=1,kernel=reference"
    arguments = ["--model", "headwise", "--model_args", model_args, "--include_path", str(tmp_path)]
    results = tmp_path / "results"
    with pytest.raises(SystemExit) as left:
        main(["lm-eval", *arguments, "--tasks", "tiny_choices", "--device", "cpu", "--output_path", str(results)])
    assert left.value.code == 0, capsys.readouterr().err
    assert "|tiny_choices|" in capsys.readouterr().out
    (record,) = results.rglob("results_*.json")
    assert json.loads(record.read_text())["config"]["headwise"]["parameters"] == describe_policy(POLICY)["parameters"]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"policy": "nothing"}, UnknownPolicyError, "unknown policy 'nothing'"),
        ({"policy": "window"}, ConfigurationError, "policy 'window' needs"),
        ({"revisions": "main"}, ConfigurationError, "has no parameter 'revisions'"),
        ({"batch_size": "auto"}, ConfigurationError, "batch_size must be a count, got 'auto'"),
        ({"rolling_prompt": 1.5}, ConfigurationError, "rolling_prompt must be"),
        ({"rolling_prompt": -1}, ConfigurationError, "rolling_prompt must be"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(options, error, says):
    with pytest.raises(error, match=says):
        HeadwiseLM(pretrained="nowhere", **options)


def test_a_policy_may_be_a_whole_spec(make):
    parameters = {"policy": "streamingllm:window=9", "sinks": 2}
    assert make(**parameters).policy == StreamingLLM(window=9, sinks=2)
    assert make().policy.recovery == 0.95
    assert make(policy="fastgen", recovery=0.5, ladder=["special", "full"]).policy.ladder == ("special", "full")


def test_what_does_not_fit_loses_its_beginning_but_never_its_end(make):
    lm = make(**EVICTING, max_length=16)
    long, short = lm.loglikelihood(requests("loglikelihood", (words(10, 60), " w61"), (words(44, 60), " w61")))
    assert long == short
    with pytest.raises(InputError, match="17 tokens does not fit into the model's 16"):
        lm.loglikelihood(requests("loglikelihood", ("w8 w9", " " + words(10, 27))))
