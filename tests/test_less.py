"""The parts of LESS: kernels, memory, checkpoint, policy, and how it is written; and the command line with it."""

from __future__ import annotations

import copy
import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import chatty
import headwise
import models
import tiny
from headwise.cli.main import main
from headwise.errors import ConfigurationError, InputError, MismatchError
from headwise.less.checkpoint import check_kernels, save_kernels, shipped_kernels
from headwise.less.features import LessKernels
from headwise.less.state import EvictedState, blend
from headwise.policies.words import describe_policy, parse_policy
from less_oracle import FEATURES, WIDTH, close, draw, kernels_of, networks_of, state

H2O = headwise.H2O(heavy=0.1, recent=0.1)
LADDER = headwise.FastGen(0.95, ladder=("special", "full"), local=8)

# Kernels.


@pytest.mark.parametrize("group", [1, 3])
def test_features_are_those_of_the_networks_that_were_trained(group):
    networks = draw(2, group, 16)
    kernels, query, keys = networks.folded(), torch.randn(3, 2, group, 5, 16), torch.randn(3, 2, 7, 16)
    assert kernels.count == FEATURES
    for found, expected in (
        (kernels.of_queries(query), networks.phi(query)),
        (kernels.of_keys(keys), networks.psi(keys)),
    ):
        close(found, expected, 1e-6)
        assert bool((found >= 0).all())
        assert expected.max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_are_computed_in_fp32(dtype):
    kernels, keys = draw(2, 3, 16).folded(), torch.randn(1, 2, 7, 16).to(dtype)
    assert kernels.of_keys(keys).dtype == torch.float32
    torch.testing.assert_close(kernels.of_keys(keys), kernels.of_keys(keys.float()), rtol=0, atol=0)


def test_the_size_is_that_of_the_paper_with_the_key_network_folded():
    queries, keys, dim = 6, 2, 14
    networks = networks_of(tiny.llama(layers=2))
    numbers = queries * (dim * WIDTH + WIDTH * FEATURES) + keys * (dim * WIDTH + WIDTH * FEATURES + FEATURES**2)
    assert networks[0].folded().nbytes == 4 * numbers
    assert kernels_of(tiny.llama(layers=2), networks).nbytes == 2 * 4 * numbers


def test_kernels_are_known_by_their_content():
    model = tiny.llama()
    one, same = (kernels_of(model, networks_of(model)) for _ in range(2))
    other = kernels_of(model, {**networks_of(model), 1: draw(2, 3, 14, seed=9)})
    assert repr(one) == repr(same) != repr(other)
    assert "LESS kernels" in repr(one)


def test_kernels_are_copied_to_a_device_once():
    kernels, device = draw(2, 3, 16).folded(), torch.device("meta")
    assert kernels.to(torch.device("cpu")) is kernels
    assert kernels.to(device) is kernels.to(device)
    assert {tensor.device for tensor in kernels.to(device).tensors().values()} == {device}


# Memory.


def filled(keys, values, order):
    """A memory into which the rows were folded in groups, in that order."""
    memory = EvictedState(draw(*keys.shape[1:2], 1, keys.shape[-1]).folded())
    for rows in order:
        dropped = torch.zeros(keys.shape[:3], dtype=torch.bool)
        dropped[:, :, rows] = True
        memory.fold(keys, values, dropped)
    return memory


@pytest.mark.parametrize(
    "order",
    [[list(range(30))], [[n] for n in range(30)], [[n] for n in reversed(range(30))], [[3, 9], [*range(10, 30)], [0]]],
    ids=["at-once", "one-by-one", "backwards", "some"],
)
def test_the_state_is_the_sum_over_the_rows_in_any_order(order):
    keys, values = torch.randn(2, 3, 30, 16), torch.randn(2, 3, 30, 7)
    memory = filled(keys, values, order)
    gone = torch.zeros(2, 3, 30, dtype=torch.bool)
    gone[:, :, list(itertools.chain(*order))] = True
    sums, mass = state(draw(3, 1, 16), keys, values, gone)
    torch.testing.assert_close(memory.sums.double(), sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(memory.mass.double(), mass, rtol=1e-5, atol=1e-5)
    assert {tensor.dtype for tensor in memory.state().values()} == {torch.float32}


def test_every_head_folds_its_own_rows_however_many_there_are():
    """More than are computed at a time, and not the same in every head."""
    keys, values = torch.randn(2, 3, 2500, 16), torch.randn(2, 3, 2500, 16)
    dropped = torch.rand(2, 3, 2500) < 0.3
    dropped[1, 2] = False
    memory = EvictedState(draw(3, 1, 16).folded())
    memory.fold(keys, values, dropped)
    sums, mass = state(draw(3, 1, 16), keys, values, dropped)
    close(memory.sums, sums, 1e-5)
    close(memory.mass, mass, 1e-5)
    assert not memory.mass[1, 2].any()


def test_rows_that_are_not_named_may_hold_anything():
    keys, values = torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)
    dropped = torch.rand(1, 2, 20) < 0.5
    clean, poisoned = (EvictedState(draw(2, 1, 16).folded()) for _ in range(2))
    clean.fold(keys, values, dropped)
    for each in (keys, values):
        each[~dropped] = torch.nan
    poisoned.fold(keys, values, dropped)
    assert torch.equal(clean.sums, poisoned.sums)
    assert torch.equal(clean.mass, poisoned.mass)


def test_without_kernels_or_evicted_rows_attention_is_what_it_was():
    rows = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 4, 16)
    query, output, lse = torch.randn(1, 2, 3, 1, 16), torch.randn(1, 2, 3, 1, 16), torch.randn(1, 2, 3, 1)
    forgetful, empty, allocated = (
        EvictedState(None),
        EvictedState(draw(2, 3, 16).folded()),
        EvictedState(draw(2, 3, 16).folded()),
    )
    forgetful.fold(*rows, torch.ones(1, 2, 4, dtype=torch.bool))
    empty.fold(*rows, torch.zeros(1, 2, 4, dtype=torch.bool))
    allocated.allocate(torch.Size([1, 2]), 16, output.device)
    assert forgetful.state() == empty.state() == {}
    for memory in (forgetful, empty, allocated):
        assert torch.equal(memory.merge(query, output, lse), output)
    assert not forgetful.remembers
    assert empty.remembers


@pytest.mark.parametrize("level", [0, 20, -20, 80, -80])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_blending_equals_the_definition_at_any_level(level, scale):
    logits, weights = torch.randn(50, 9, dtype=torch.double) + level, torch.rand(50, 6, dtype=torch.double) * scale
    kept, gone = torch.randn(50, 9, 7, dtype=torch.double), torch.randn(50, 6, 7, dtype=torch.double)
    both = torch.cat([logits.exp(), weights], 1)
    expected = (both[:, :, None] * torch.cat([kept, gone], 1)).sum(1) / both.sum(1, keepdim=True)
    output = (logits.softmax(1)[:, :, None] * kept).sum(1).float()
    sums, mass = (weights[:, :, None] * gone).sum(1).float(), weights.sum(1).float()
    found = blend(output, logits.logsumexp(1).float(), sums, mass)
    assert float((found - expected).abs().max()) <= 1e-6


def test_blending_with_nothing_on_one_side_or_both():
    output, sums = torch.tensor([[3.0], [0.0], [0.0]]), torch.tensor([[0.0], [10.0], [0.0]])
    lse, mass = torch.tensor([1.0, -torch.inf, -torch.inf]), torch.tensor([0.0, 4.0, 0.0])
    assert blend(output, lse, sums, mass).tolist() == [[3.0], [2.5], [0.0]]


def test_gradients_are_finite_where_nothing_was_folded_in():
    output, sums = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    lse, mass = torch.randn(4, requires_grad=True), torch.tensor([0.0, 0.0, 1e-30, 2.0], requires_grad=True)
    blend(output, lse, sums, mass).sum().backward()
    for each in (output, lse, mass, sums):
        assert bool(each.grad[[0, 1, 3]].isfinite().all())
    assert torch.equal(output.grad[0], torch.ones(5))


def test_a_state_can_be_selected_moved_saved_and_forgotten():
    keys, values = torch.randn(3, 2, 9, 16), torch.randn(3, 2, 9, 16)
    memory = filled(keys, values, [list(range(9))])
    whole = copy.copy(memory.state())
    other = EvictedState(memory.features)
    other.restore(memory.state())
    assert other.sums is memory.sums
    memory.select(torch.tensor([2, 0, 2]))
    assert torch.equal(memory.sums, whole["less_sums"][[2, 0, 2]])
    assert torch.equal(memory.mass, whole["less_mass"][[2, 0, 2]])
    memory.to(torch.device("meta"))
    assert {tensor.device.type for tensor in memory.state().values()} == {"meta"}
    memory.reset()
    assert memory.state() == {}


# Checkpoint.


@pytest.fixture
def model():
    return tiny.llama()


@pytest.fixture
def saved(model, tmp_path):
    save_kernels(kernels_of(model, networks_of(model)), tmp_path / "deep" / "kernels")
    return tmp_path / "deep" / "kernels"


def test_what_is_saved_comes_back_in_half_precision(model, saved):
    before, after = kernels_of(model, networks_of(model)), headwise.load_kernels(saved)
    assert after.about == before.about
    assert after.name == str(saved)
    assert list(after.layers) == [0, 1, 2]
    for index, layer in before.layers.items():
        for name, tensor in layer.tensors().items():
            found = getattr(after.layers[index], name)
            assert found.dtype == torch.float32
            assert torch.equal(found, tensor.half().float())
    assert {n: t.tolist() for n, t in after.sample.items()} == {n: t.tolist() for n, t in before.sample.items()}
    assert sum(file.stat().st_size for file in saved.iterdir()) < 0.6 * before.nbytes + 20_000


def test_the_same_model_is_known_again_in_other_precisions(model, saved):
    kernels = headwise.load_kernels(saved)
    check_kernels(kernels, model)
    check_kernels(kernels, tiny.llama(dtype=torch.bfloat16))
    check_kernels(kernels, tiny.llama(dtype=torch.float16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.08 * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0
    check_kernels(kernels, model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.llama(seed=1), "the weights of this one differ by 1[2-6].%"),
        (lambda: tiny.llama(layers=2), r"this one differs in 'model\.layers\.2"),
        (lambda: models.shared("qwen2"), r"this one differs in 'model\.layers\.0\.self_attn\.k_proj\.bias'"),
        (lambda: models.shared("gpt2"), "this one differs in"),
    ],
    ids=["weights", "layers", "family", "another-family"],
)
def test_another_model_is_refused(saved, make, message):
    with pytest.raises(MismatchError, match=f"trained for LlamaForCausalLM; {message}.*`headwise train-less`"):
        check_kernels(headwise.load_kernels(saved), make())


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "qwen3"])
def test_weights_that_every_untrained_model_has_do_not_count(family):
    """Norms and biases of a fresh model are all ones and zeros."""
    model = models.shared(family)
    kernels = LessKernels({}, {"model": family}, kernels_of(model, {}).sample)
    check_kernels(kernels, model)
    with pytest.raises(MismatchError, match="the weights of this one differ"):
        check_kernels(kernels, models.build(family, seed=1))


def test_weights_that_are_no_numbers_are_refused(model, saved):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(MismatchError):
        check_kernels(headwise.load_kernels(saved), model)


def rewrite(folder, change, metadata):
    tensors = load_file(folder / "kernels.safetensors")
    change(tensors)
    save_file(tensors, folder / "kernels.safetensors", metadata)


BROKEN = {
    "missing": (lambda folder: shutil.rmtree(folder), "it has no config.json; `headwise train-less` makes one"),
    "no-config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "no-weights": (lambda folder: (folder / "kernels.safetensors").unlink(), "it has no kernels.safetensors"),
    "no-json": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
    "no-text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "no-object": (lambda folder: (folder / "config.json").write_text("[3]"), "cannot be read"),
    "garbage": (lambda folder: (folder / "kernels.safetensors").write_bytes(b"kernels"), "cannot be read"),
    "unnamed": (lambda folder: rewrite(folder, lambda _: None, None), "not written by this version of headwise"),
    "newer": (lambda folder: rewrite(folder, lambda _: None, {"format": "headwise-less-9"}), "not written by this"),
    "incomplete": (
        lambda folder: rewrite(folder, lambda t: t.pop("layers.1.key_mix"), {"format": "headwise-less-1"}),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_holds_no_kernels_is_refused(saved, name):
    change, message = BROKEN[name]
    change(saved)
    with pytest.raises(InputError, match=message) as raised:
        headwise.load_kernels(saved)
    assert repr(str(saved)) in str(raised.value)


def test_a_folder_that_cannot_be_written_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        save_kernels(kernels_of(model, networks_of(model)), tmp_path / "file" / "kernels")


# Policy.


def test_it_chooses_as_the_policy_does():
    for policy in (H2O, headwise.FastGen(0.9), headwise.PyramidKV(keep=64), headwise.KVzip(keep=0.5)):
        less = headwise.Less(policy)
        # All else that is asked of a policy that chooses is asked of the policy itself.
        for name in ("rungs", "facts", "precision"):
            assert getattr(less, name) == getattr(policy, name), name
        assert less.chooser is policy
        assert less.layers == {}
        assert not less.trained


def test_it_is_written_as_python_would_build_it(model):
    assert str(headwise.Less(H2O)) == "Less(H2O(heavy=0.1, recent=0.1))"
    assert str(headwise.Less(H2O, "there")) == "Less(H2O(heavy=0.1, recent=0.1), kernels='there')"
    kernels = kernels_of(model, networks_of(model))
    assert str(headwise.Less(H2O, kernels)) == f"Less(H2O(heavy=0.1, recent=0.1), kernels={kernels!r})"
    assert json.loads(json.dumps(describe_policy(headwise.Less(H2O, kernels)))) == {
        "name": "less",
        "parameters": {
            "policy": {"name": "h2o", "parameters": {"heavy": 0.1, "recent": 0.1}},
            "kernels": repr(kernels),
        },
    }


def test_a_budget_is_the_policys():
    assert headwise.Less(headwise.SnapKV(keep=9)).with_keep(5) == headwise.Less(headwise.SnapKV(keep=5))
    with pytest.raises(ConfigurationError, match="full has no budget"):
        headwise.Less(headwise.Full()).with_keep(5)


@pytest.mark.parametrize("wrapped", [headwise.Less(H2O), headwise.Less(H2O, "there")], ids=str)
def test_one_memory_is_enough(wrapped):
    with pytest.raises(ConfigurationError, match=r"Less wraps a policy such as H2O\(keep=0.05\), got Less"):
        headwise.Less(wrapped)


def test_two_with_kernels_can_be_compared(model, saved):
    one, other = headwise.Less(H2O, saved).load(model), headwise.Less(H2O, saved).load(model)
    assert one != other
    assert repr(one) == repr(other)
    assert len({one, other}) == 2


def test_kernels_that_did_not_come_with_headwise_are_asked_for(model, saved, monkeypatch):
    monkeypatch.setattr("headwise.policies.less.shipped_kernels", lambda: saved)
    assert list(headwise.Less(H2O).load(model).layers) == [0, 1, 2]
    monkeypatch.setattr("headwise.policies.less.shipped_kernels", lambda: saved / "nothing")
    with pytest.raises(InputError, match=r"no kernels of LESS in .*`headwise train-less` makes one"):
        headwise.Less(H2O).load(model)
    assert shipped_kernels().parent.name == "less"


def test_kernels_know_which_policies_they_have_seen(model):
    kernels = kernels_of(model, networks_of(model), policies=("h2o:heavy=0.05,recent=0.05", "streamingllm"))
    assert headwise.Less(H2O, kernels).trained
    assert headwise.Less(headwise.StreamingLLM(64), kernels).trained
    assert not headwise.Less(headwise.Window(64), kernels).trained


# As words.


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ("h2o:heavy=0.1,recent=0.1+less", headwise.Less(H2O)),
        ("h2o:heavy=0.1,recent=0.1+less=some/where", headwise.Less(H2O, "some/where")),
        ("h2o:heavy=0.1,recent=0.1 +less= a,b=c ", headwise.Less(H2O, "a,b=c")),
        ("full+less", headwise.Less(headwise.Full())),
        ("fastgen:ladder=special,full,local=8+less", headwise.Less(LADDER)),
        ("h2o:heavy=0.1,recent=0.1", H2O),
    ],
)
def test_a_policy_that_remembers_as_words(spec, policy):
    assert parse_policy(spec) == policy


@pytest.mark.parametrize("spec", ["full+lesser", "full+less:there", "full+less there"])
def test_what_stands_behind_less_must_be_a_folder(spec):
    with pytest.raises(ConfigurationError, match=r"stands \+less, \+less=FOLDER or \+BITS"):
        parse_policy(spec)


# The command line.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chatty.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def call(capsys, tmp_path, monkeypatch, folder):
    monkeypatch.setenv("HEADWISE_MODEL", str(folder))
    talker = chatty.model()
    save_kernels(kernels_of(talker, networks_of(talker)), tmp_path / "kernels")

    def run(*arguments):
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return left.value.code, captured.out, captured.err

    return run


SHORT = ("--prompt", chatty.TEXT, "--policy", "streamingllm", "--set", "window=6")
COMMANDS = {"generate": ("generate", *SHORT, "--max-new-tokens", 9), "profile": ("profile", *SHORT)}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_a_folder_of_kernels(call, tmp_path, command):
    code, out, err = call(*COMMANDS[command], "--less-kernels", tmp_path / "kernels", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["policy"]["name"] == "less"
    assert found["policy"]["parameters"]["policy"]["name"] == "streamingllm"
    assert found["policy"]["parameters"]["kernels"].startswith("<LESS kernels ")
    # Two layers, two KV heads, 4 features of 8 numbers and one more.
    assert found["memory"]["memory_bytes"] == 2 * 2 * 4 * 9 * 4
    assert found["memory"]["weight_bytes"] == headwise.load_kernels(tmp_path / "kernels").nbytes
    plain = json.loads(call(*COMMANDS[command], "--json")[1])
    assert set(plain["memory"]) == {"used_bytes", "allocated_bytes", "full_bytes"}
    assert found["memory"]["used_bytes"] == plain["memory"]["used_bytes"] + found["memory"]["memory_bytes"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_what_is_remembered(call, tmp_path, monkeypatch, command):
    monkeypatch.setattr("headwise.policies.less.shipped_kernels", lambda: tmp_path / "kernels")
    code, out, err = call(*COMMANDS[command], "--less")
    assert code == 0
    told = err if command == "generate" else out
    assert "Less(StreamingLLM(window=6)" in told
    assert "remembered" in told
    assert "576 B of it for evicted tokens" in told
    assert "remembered" not in "".join(call(*COMMANDS[command])[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_without_kernels_a_command_says_so_before_it_loads_a_model(call, tmp_path, monkeypatch, command):
    monkeypatch.setenv("HEADWISE_MODEL", str(tmp_path / "nothing"))
    monkeypatch.setattr("headwise.policies.less.shipped_kernels", lambda: tmp_path / "none")
    for more in (("--less",), ("--less-kernels", tmp_path / "none")):
        code, _, err = call(*COMMANDS[command], *more)
        assert code == 2
        assert "error: no kernels of LESS in" in err
        assert "`headwise train-less` makes one" in err
