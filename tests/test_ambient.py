"""Whatever a thread has set of torch, and however it changes between passes, a cache gives what it always gives."""

from __future__ import annotations

import ast
import functools
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import headwise
import tiny
from cases import pairwise
from every_policy import EVERY
from headwise.stages.ambient import undisturbed

POLICIES = [
    *(policy for policy in EVERY if policy.gates is False),
    headwise.Quantized(headwise.H2O(heavy=3, recent=6), key_bits=8, value_bits=4, recent=3, sinks=1),
]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# A pass each; the first is that of the prompt.
SETTINGS = {
    "default dtype": [lambda: default_dtype(torch.float64), lambda: default_dtype(torch.bfloat16), nullcontext],
    "default device": [lambda: torch.device("meta"), nullcontext, lambda: torch.device("meta")],
    "inference, then not": [torch.inference_mode, torch.no_grad],
    "inference now and then": [torch.no_grad, torch.inference_mode],
    "with gradients": [torch.enable_grad, torch.no_grad],
    "deterministic": [nullcontext, deterministic],
}


# Lengths of passes; rules are applied in one token and in several, and pages begin and end.
STEPS = [31, 1, 1, 1, 1, 5, 2, 1, 1]


@functools.cache
def undisturbed_logits(policy, kernel):
    return logits(tiny.llama(layers=2), policy, tiny.prompt(51, batch=2, seed=4), [nullcontext], kernel)


def logits(model, policy, ids, settings, kernel):
    cache = headwise.HeadwiseCache(model, policy, tokenizer=tiny.tokenizer(), evict_every=4, page_size=4, kernel=kernel)
    found, start = [], 0
    with torch.no_grad():
        for index, step in enumerate(STEPS):
            new, start = ids[:, start : start + step], start + step
            mask = torch.ones(len(ids), start, dtype=torch.long)
            mask[0, :5] = 0
            at = (mask.cumsum(1) - 1).clamp(min=0)[:, -step:]
            with settings[index % len(settings)]():
                output = model(input_ids=new, attention_mask=mask, position_ids=at, past_key_values=cache)
            found.append(output.logits.detach().clone()[:, -1])
            if index == len(STEPS) - 3:
                with settings[0]():
                    cache.batch_select_indices(torch.tensor([1, 0], device="cpu"))
                    cache.batch_select_indices(torch.tensor([1, 0], device="cpu"))
    return torch.stack(found)


@pairwise(policy=POLICIES, changed=list(SETTINGS), kernel=["reference", "cpu"])
def test_settings_that_change_between_passes_change_nothing(policy, changed, kernel):
    model, ids = tiny.llama(layers=2), tiny.prompt(51, batch=2, seed=4)
    found, expected = logits(model, policy, ids, SETTINGS[changed], kernel), undisturbed_logits(policy, kernel)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_own_work_is_done_under_own_settings():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), undisturbed():
        made = torch.ones(2, 2) @ torch.ones(2, 2)
        assert made.dtype == torch.float32
        assert not made.is_inference()
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("policy", [headwise.Full(), headwise.H2O(heavy=8, recent=8)], ids=str)
def test_autocast_computes_attention_in_its_type(policy):
    """Rotary embeddings give keys in fp32 and queries in bf16, say; torch's own attention takes them as well."""
    model, ids = tiny.llama(), tiny.prompt(40, batch=2)

    def run(cache, setting):
        with torch.no_grad(), setting:
            first = model(input_ids=ids, past_key_values=cache).logits[:, -1:]
            return torch.cat([first, model(input_ids=ids[:, :1], past_key_values=cache).logits], dim=1)

    cache = headwise.HeadwiseCache(model, policy)
    mine = run(cache, torch.autocast("cpu", torch.bfloat16))
    assert {layer.core.store.exact.pools["keys"].dtype for layer in cache.headwise_layers} == {torch.bfloat16}
    if policy == headwise.Full():
        # As far from what there is without it as the stock cache is.
        exact = run(DynamicCache(config=model.config), nullcontext())
        stock = run(DynamicCache(config=model.config), torch.autocast("cpu", torch.bfloat16))
        assert 0 < (mine - exact).norm() < 1.3 * (stock - exact).norm()
    # What was read under autocast is read on without.
    with torch.no_grad():
        assert model(input_ids=ids[:, :1], past_key_values=cache).logits.isfinite().all()


def test_gradients_are_refused_when_they_are_asked_for():
    """Whoever forgets no_grad() gets his tokens; whoever wants gradients is told that some would be missing."""
    model, ids = tiny.llama(), tiny.prompt(20)
    cache = headwise.HeadwiseCache(model, headwise.Full())
    for new in (ids, ids[:, :1]):
        loss = model(input_ids=new, past_key_values=cache).logits.square().mean()
        with pytest.raises(headwise.CacheStateError, match="gradients do not pass through a compressed cache"):
            loss.backward()
    # Nothing that the cache keeps ties the graph of a pass.
    assert not any(tensor.requires_grad for tensor in cache.tensors())
    # A pass without it is none of ours.
    model(input_ids=ids).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


MAKERS = re.compile("empty|zeros|ones|full|tensor|arange|rand|randn|randint|linspace|eye|randperm")
# They serve people, and set nothing that lives on.
NOT_CORE = {"cli", "bench", "eval", "training", "measure"}


def made(path):
    """Tensors that a file makes out of nothing: by what, the arguments that it names, and the line."""
    for call in ast.walk(ast.parse(path.read_text())):
        package, _, maker = ast.unparse(call.func).rpartition(".") if isinstance(call, ast.Call) else ("", "", "")
        if package == "torch" and MAKERS.fullmatch(maker):
            spread = any(ast.unparse(keyword.value) == "FLOAT" for keyword in call.keywords if keyword.arg is None)
            yield maker, {"dtype", "device"} if spread else {keyword.arg for keyword in call.keywords}, call.lineno


def test_every_tensor_that_is_made_names_its_type_and_device():
    unnamed, named = [], 0
    root = Path(headwise.__file__).parent
    for path in root.rglob("*.py"):
        for maker, given, line in made(path) if path.relative_to(root).parts[0] not in NOT_CORE else ():
            # Whole numbers are int64 whatever the default.
            needed = {"device"} if maker in ("arange", "tensor") else {"dtype", "device"}
            named += 1
            if needed - given:
                unnamed.append(f"{path.relative_to(root)}:{line} torch.{maker}")
    assert named > 50
    assert unnamed == []
