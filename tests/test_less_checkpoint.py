"""Kernels of LESS in files: what comes back, the models they are for, and folders that are refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import headwise
import models
import tiny
from headwise.errors import InputError, MismatchError
from headwise.less.checkpoint import check_kernels, save_kernels
from headwise.less.features import LessKernels
from less_oracle import kernels_of, networks_of
from less_saved import model, saved

__all__ = ["model", "saved"]


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
