"""Evaluations through a server, which here is a few lines that speak its protocol."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import chatty
from headwise.cli.main import main
from headwise.errors import ConfigurationError
from headwise.eval.model_source import ModelSource
from headwise.eval.server import Server
from headwise.eval.server_executor import ServerExecutor
from headwise.eval.setting import describe_setting
from headwise.hosts.vllm.options import Options
from headwise.policies.words import parse_policy, policy_words

pytestmark = pytest.mark.own
METRICS = 'vllm:cache_config_info{block_size="8",cache_dtype="auto"} 1.0\n'
WORDS = len(chatty.tokenizer())


class Fake:
    """A server that writes what it is told, and then one token again and again."""

    def __init__(self):
        self.asked, self.obeys, self.active, self.says, self.seconds = [], True, True, 7, 0.0
        self.tokenizer, self.most = chatty.tokenizer(), None

    def answer(self, asked):
        """Status, and an object or the parts of a stream."""
        xargs = asked["vllm_xargs"]
        if self.active and xargs.get("headwise_ratio", 1) < 0:
            return 400, {"error": {"message": "headwise: ratio must be above 0"}}
        if xargs.get("headwise_policy") == "keydiff":
            return 400, {"error": {"message": "this engine cannot"}}
        self.asked.append(asked)
        self.seconds += 0.5 if "headwise_policy" in xargs else 0
        forced = xargs.get("forced_ids", []) if self.obeys else []
        new = [*forced, *[self.says] * asked["max_tokens"]][: asked["max_tokens"]]
        # Half of the probability is its own token's, a quarter the next one's, and the others share the rest.
        top = {f"token_id:{self.says}": math.log(0.5), f"token_id:{self.says + 1}": math.log(0.25)}
        return 200, [{"choices": [{"logprobs": {"tokens": [f"token_id:{id}"], "top_logprobs": [top]}}]} for id in new]


@pytest.fixture
def fake():
    fake = Fake()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def send(self, status, text):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self):
            told = {
                "/v1/models": json.dumps({"data": [{"id": "m", "root": "some/model"}]}),
                "/version": json.dumps({"version": "0.99"}),
            }
            told["/metrics"] = METRICS + f'headwise:choosing_seconds_total{{policy="a"}} {fake.seconds}\n'
            self.send(200 if self.path in told else 404, told.get(self.path, "?"))

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                ids = fake.tokenizer(asked["prompt"], add_special_tokens=asked["add_special_tokens"])["input_ids"]
                return self.send(200, json.dumps({"tokens": ids}))
            status, said = fake.answer(asked)
            if isinstance(said, dict):
                self.send(status, json.dumps(said))
                return None
            text = "".join(f"data: {json.dumps(part)}\n\n" for part in said[: fake.most])
            return self.send(status, text + "data: [DONE]\n\n")

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    fake.url = f"http://127.0.0.1:{httpd.server_port}"
    yield fake
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def asked(fake, ends=frozenset()):
    return Server(fake.url, chatty.tokenizer(), WORDS, ends)


def test_rows_hold_what_was_told_and_spread_the_rest(fake):
    server = asked(fake)
    assert (server.block_size, server.release) == (8, "0.99")
    found = server.write([1, 2], 4, Options("snapkv", 0.5), [9, 8], rows=True)
    assert found.ids == [9, 8, 7, 7] and found.rows.shape == (4, WORDS)
    probabilities = found.rows.exp()
    torch.testing.assert_close(probabilities[:, 7:9], torch.tensor([[0.5, 0.25]] * 4))
    torch.testing.assert_close(probabilities[:, [0, 6, WORDS - 1]], torch.full((4, 3), 0.25 / (WORDS - 2)))
    assert found.choosing == 0.5 and found.seconds > 0
    (request,) = fake.asked
    assert request["vllm_xargs"] == {"headwise_policy": "snapkv", "headwise_ratio": 0.5, "forced_ids": [9, 8]}
    assert (request["temperature"], request["repetition_penalty"], request["model"]) == (0, 1.0, "m")
    server.write([1], 1, None)
    # Whatever the server does by default.
    assert fake.asked[-1]["vllm_xargs"] == {"headwise": "off"}


def test_an_end_counts_only_behind_what_must_be_written(fake):
    found = asked(fake, {7}).write([1], 6, None, [7, 7, 3], rows=True)
    assert found.ids == [7, 7, 3, 7] and len(found.rows) == 4


def test_servers_that_cannot_be_used_are_refused(fake):
    with pytest.raises(ConfigurationError, match="refused: this engine cannot"):
        asked(fake).write([1], 1, Options("keydiff"))
    fake.obeys = False
    with pytest.raises(ConfigurationError, match=r"does not write what it is told to: start it with --logits-proc"):
        asked(fake).write([1], 2, None, [3])
    fake.obeys, fake.most = True, 3
    with pytest.raises(ConfigurationError, match="broke off after 3 of 5 tokens"):
        asked(fake).write([1], 5, None, [3])
    fake.most, fake.tokenizer = None, lambda text, **_: {"input_ids": [1, 2]}
    with pytest.raises(ConfigurationError, match="has 'some/model', whose tokens are not those of the model given"):
        asked(fake)
    fake.tokenizer, fake.active = chatty.tokenizer(), False
    with pytest.raises(ConfigurationError, match="headwise is not active in"):
        asked(fake)
    for url in ("http://127.0.0.1:9", "nowhere"):
        with pytest.raises(ConfigurationError, match="no server answers at"):
            Server(url, chatty.tokenizer(), WORDS, set())


@pytest.fixture
def folder(tmp_path):
    chatty.save(tmp_path / "model", positions=512)
    return str(tmp_path / "model")


def run(fake, folder, tmp_path, *words):
    (tmp_path / "text").write_text(chatty.TEXT * 40)
    given = ["--text", str(tmp_path / "text"), "--model", folder, "--dtype", "float32", "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as left:
        main(["eval", *words, *given, "--server", fake.url, "--json"])
    return left.value.code


def test_fidelity_is_measured_behind_the_prompt(fake, folder, tmp_path, capsys):
    words = ("--context", "45", "--steps", "6", "--passages", "1", "--policy", "snapkv:window=4,keep=0.3,of=prompt")
    assert run(fake, folder, tmp_path, "fidelity", *words) in (0, None)
    results = json.loads(capsys.readouterr().out)
    reference, full, kept, drawn = fake.asked
    assert len(reference["prompt"]) == 45 and len(reference["vllm_xargs"]["forced_ids"]) == 7
    # Read anew: what was read before would cost nothing.
    assert reference.pop("cache_salt") != full.pop("cache_salt")
    assert reference == full
    assert kept["vllm_xargs"].items() >= {"headwise_policy": "snapkv:window=4", "headwise_ratio": 0.3}.items()
    # Five blocks of eight, of which two stay, and five tokens that fill none.
    assert drawn["vllm_xargs"].items() >= {"headwise_policy": "random:seed=0", "headwise_ratio": 0.4}.items()
    rows = {row["policy"]: row for row in results["summaries"][0]["rows"]}
    assert [round(row["kept_ratio"] * 45) for row in rows.values()] == [45, 21, 21]
    assert rows["full"]["full_bytes"] == 45 * 2 * chatty.LAYERS * chatty.KV_HEADS * 8 * 4
    assert all(row["metrics"]["kl"]["mean"] == 0 for row in rows.values())
    targets, told = reference["vllm_xargs"]["forced_ids"][1:], {fake.says: 0.5, fake.says + 1: 0.25}
    assert rows["full"]["metrics"]["top1"]["mean"] == 1
    nll = -sum(math.log(told.get(id, 0.25 / (WORDS - 2))) for id in targets) / 6
    assert results["units"][0]["details"]["nll"] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize(("query", "forced"), [("aware", False), ("agnostic", True)])
def test_a_question_is_read_before_or_behind_the_choice(fake, folder, tmp_path, capsys, query, forced):
    fake.says = chatty.tokenizer()("9")["input_ids"][0]
    words = ("--context", "60", "--items", "2", "--query", query, "--new-tokens", "5", "--no-random")
    assert run(fake, folder, tmp_path, "recall", *words, "--policy", "adakv:over=tova,keep=0.5,of=prompt") in (0, None)
    results = json.loads(capsys.readouterr().out)
    assert all(("forced_ids" in request["vllm_xargs"]) == forced for request in fake.asked)
    lengths = {len(r["prompt"]) + len(r["vllm_xargs"].get("forced_ids", ())) for r in fake.asked[::2]}
    assert len(fake.asked) == 4 and min(lengths) > 60
    assert {unit["details"]["answer"] for unit in results["units"]} == {"99999"}
    assert results["configuration"]["source"]["server"] == results["machine"]["server"] == fake.url
    assert results["machine"]["root"] == "some/model" and results["versions"]["vllm"] == "0.99"
    assert fake.url in describe_setting(results)["machine"] and "kernel" not in describe_setting(results)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("fidelity", "--policy", "snapkv:keep=0.5"), "say of=prompt"),
        (("fidelity", "--policy", "snapkv:keep=64,of=prompt"), "has a size that is no share of the prompt"),
        (("fidelity", "--policy", "h2o:heavy=0.2,recent=0.2"), "has no keep"),
        (("fidelity", "--policy", "transformers:quanto-int4"), "cannot be asked of a server"),
        (("long", "--policy", "full"), "'long' cannot be measured through a server"),
        (("turns", "--policy", "full"), "cannot be measured through a server"),
        (("fidelity", "--ray"), "--ray does not go with --server"),
        (("fidelity", "--kernel", "reference"), "--kernel does not go with --server"),
        (("fidelity", "--dtype", "auto"), "say it with --dtype"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is(fake, folder, tmp_path, capsys, words, why):
    small = ("--context", "300") if words[0] == "turns" else ("--context", "40", "--steps", "4", "--passages", "1")
    command = [*words[:1], *small, *words[1:]]
    if words[-1] == "auto":
        with pytest.raises(ConfigurationError, match=why):
            ServerExecutor(ModelSource(folder), fake.url)
        return
    assert run(fake, folder, tmp_path, *command) not in (0, None)
    assert why in capsys.readouterr().err.replace("\n", " ")
    assert not fake.asked


@pytest.mark.parametrize(
    "words", ["adakv:over=keydiff,safeguard=0.5", "snapkv:window=8", "keydiff", "streamingllm:sinks=2", "rkv"]
)
def test_policies_and_their_words(words):
    policy = parse_policy(words, budgeted=True)
    sized = policy.with_keep(0.25) if "keep" in policy.parameters() else policy
    said = policy_words(sized, without=("keep", "of"))
    assert parse_policy(said, budgeted=True).with_keep(5) == sized.with_keep(5)


def test_policies_that_have_no_words():
    from headwise.policies import AdaKV, SnapKV

    with pytest.raises(ConfigurationError, match="over cannot be said in words"):
        policy_words(AdaKV(0.5, over=SnapKV(0.5, window=3)))


def test_only_what_says_so_is_measured_through_servers():
    """A task that measures otherwise than the one it is made of would be measured as that one."""
    import headwise.eval.long
    import headwise.eval.steering.marked_recall
    import headwise.eval.synthetic  # noqa: F401  # its classes are looked for
    from headwise.eval.task import Task

    def classes(base):
        return {base, *(each for own in base.__subclasses__() for each in classes(own))}

    served = {each.__name__ for each in classes(Task) if each.through_server}
    assert served == {"Fidelity", "Recall", "Synthetic"}
