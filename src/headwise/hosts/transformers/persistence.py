"""Persistence: a compressed cache -> a safetensors file, and back for the same model and policy."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from headwise.errors import InputError, MismatchError
from headwise.files import whole_file
from headwise.hosts.transformers.cache import HeadwiseCache
from headwise.hosts.transformers.layer import HeadwiseLayer
from headwise.types import Tensor

_FORMAT = "headwise-cache-2"

# Of every parameter: enough numbers to tell two trainings of one architecture apart.
_SAMPLED_WEIGHTS = 16


def save(cache: HeadwiseCache, path: Path) -> None:
    """Write everything the cache holds; tokens of the last pass can then no longer be taken back.

    Raises:
        CacheStateError: when a prompt is still coming in.
    """
    tensors, plain = collect(cache)
    metadata = {
        "format": _FORMAT,
        "model": model_fingerprint(cache.model),
        "model_name": cache.model_name,
        "policy": repr(cache.policy),
        "kinds": "" if cache.kind_table is None else cache.kind_table.fingerprint,
        "state": json.dumps(plain),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as scratch:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, metadata)


def load(cache: HeadwiseCache, path: Path) -> None:
    """Fill a new cache with what `save` wrote.

    Raises:
        InputError: when the file is missing or not a saved cache.
        MismatchError: when it was written with another model or policy.
    """
    if not path.is_file():
        raise InputError(f"no saved cache at {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise InputError(f"{str(path)!r} is not a cache saved by this version of headwise ({_FORMAT})")
            _check_owner(cache, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise InputError(f"{str(path)!r} is not a safetensors file: {error}") from error
    device = cache.model.get_decoder().device
    fill(cache, {name: tensor.to(device) for name, tensor in tensors.items()}, json.loads(metadata["state"]))


def collect(cache: HeadwiseCache) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies of everything a cache holds, by name: tensors, and what is plain data.

    Raises:
        CacheStateError: when a prompt is still coming in.
    """
    tensors = {f"transcript.{name}": tensor for name, tensor in cache.transcript.tensors().items()}
    if cache.kind_table is not None and cache.kind_table.ids is not None:
        tensors["kinds.ids"] = cache.kind_table.ids
    plain: dict[str, Any] = {"columns": cache.transcript.columns, "passes": cache.passes}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, HeadwiseLayer):
            # After assisted decoding the last tokens still wait for a crop that will not come.
            layer.core.settle()
            state = layer.core.state()
        else:
            # Everything a stock layer is made of; None and callables are made anew with the layer.
            state = {name: value for name, value in vars(layer).items() if isinstance(value, Tensor)}
            plain[str(index)] = {
                name: value
                for name, value in vars(layer).items()
                if isinstance(value, bool | int) and name != "record_past"
            }
        tensors.update({f"layers.{index}.{name}": tensor for name, tensor in state.items()})
    return {name: tensor.clone() for name, tensor in tensors.items()}, plain


def fill(cache: HeadwiseCache, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Give a new cache what `collect` took from another of the same model and policy."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, field = name.rpartition(".")
        parts.setdefault(owner, {})[field] = tensor
    cache.transcript.restore(plain["columns"], parts.get("transcript", {}))
    if cache.kind_table is not None:
        cache.kind_table.ids = parts.get("kinds", {}).get("ids")
    cache.passes = plain["passes"]
    for index, layer in enumerate(cache.layers):
        state = parts.get(f"layers.{index}", {})
        if isinstance(layer, HeadwiseLayer):
            layer.restore(state)
        else:
            for name, value in {**plain[str(index)], **state}.items():
                setattr(layer, name, value)
            if isinstance(state.get("keys"), Tensor):
                layer.dtype, layer.device = state["keys"].dtype, state["keys"].device


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hash of a model's shapes and of a few numbers of every parameter; the same on every device."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        sample = parameter.detach().flatten()
        step = max(1, len(sample) // _SAMPLED_WEIGHTS)
        digest.update(sample[::step][:_SAMPLED_WEIGHTS].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _check_owner(cache: HeadwiseCache, metadata: dict[str, str]) -> None:
    if metadata.get("policy") != repr(cache.policy):
        raise MismatchError(f"the cache was saved with {metadata.get('policy')}, not with {cache.policy!r}")
    if metadata.get("kinds") != ("" if cache.kind_table is None else cache.kind_table.fingerprint):
        raise MismatchError("the cache was saved with another tokenizer or other markers")
    if metadata.get("model") != model_fingerprint(cache.model):
        raise MismatchError(
            f"the cache was saved with another {metadata.get('model_name')}: shapes, dtype or weights differ from "
            f"those of this {cache.model_name}"
        )


__all__ = ["collect", "fill", "load", "model_fingerprint", "save"]
