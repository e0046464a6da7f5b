"""Persistence: a compressed cache -> a safetensors file, and back for the same model and policy."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from headwise.errors import CacheStateError, InputError, MismatchError
from headwise.files import whole_file
from headwise.hosts.transformers.adapters import active_adapters
from headwise.hosts.transformers.kinds import KindTable
from headwise.hosts.transformers.layer import HeadwiseLayer
from headwise.hosts.transformers.model_facts import read_facts
from headwise.hosts.transformers.parts import CacheParts
from headwise.hosts.transformers.saved_checks import check_saved, checksum
from headwise.hosts.transformers.stock_layers import restore_stock, stock_state
from headwise.policies import FORMER_CLASSES
from headwise.policies.base import Policy
from headwise.steer.steering import BaseSteering
from headwise.types import Tensor
from headwise.weights import fingerprint

_FORMAT = "headwise-cache-4"

# Policies did not say yet what a fraction is of; and before that, there was no checksum.
_FORMER, _UNCHECKED = "headwise-cache-3", "headwise-cache-2"

_CHECKSUM = "checksum"

# What the names of the token log's tensors begin with in a file.
_LOG = "transcript"


@dataclass(frozen=True)
class Owner:
    """What a saved cache must be loaded with.

    Attributes:
        model: that it was made for, and its name.
        kinds: what it takes tokens for, where the policy asks.
        steering: None where nothing is steered.
    """

    model: PreTrainedModel
    model_name: str
    policy: Policy
    kinds: KindTable | None
    steering: BaseSteering | None

    def metadata(self) -> dict[str, str]:
        """As a file has it."""
        return {
            "model": fingerprint(self.model),
            "model_name": self.model_name,
            "policy": repr(self.policy),
            "adapters": active_adapters(self.model),
            "kinds": "" if self.kinds is None else self.kinds.fingerprint,
            "steering": "" if self.steering is None else repr(self.steering),
        }

    def check(self, found: dict[str, str]) -> None:
        """Refuse what belongs to another.

        Raises:
            MismatchError: naming what differs.
        """
        own, former = self.metadata(), found.get("format") != _FORMAT
        if _current(found.get("policy", "")) != (_as_before(own["policy"]) if former else own["policy"]):
            hint = ", which chose from the prompt once: of='prompt'" if former and "of='seen'" in own["policy"] else ""
            raise MismatchError(f"the cache was saved with {found.get('policy')}{hint}, not with {self.policy!r}")
        if found.get("kinds") != own["kinds"]:
            raise MismatchError("the cache was saved with another tokenizer or other markers")
        if (steering := found.get("steering", "")) != own["steering"]:
            raise MismatchError(
                f"the cache was saved with {steering or 'no'} steering, not with {own['steering'] or 'none'}"
            )
        # Files written before this was noted say nothing of it.
        if found.get("adapters", own["adapters"]) != own["adapters"]:
            raise MismatchError(
                f"the cache was saved with the adapters [{found.get('adapters')}] active, not with [{own['adapters']}]"
            )
        if found.get("model") != own["model"]:
            raise MismatchError(
                f"the cache was saved with another {found.get('model_name')}: shapes, dtype or weights differ from "
                f"those of this {self.model_name}"
            )


def save(parts: CacheParts, passes: int, owner: Owner, path: Path) -> None:
    """Write everything a cache holds; tokens of the last pass can then no longer be taken back.

    Raises:
        CacheStateError: when a prompt is still coming in.
        FileWriteError: when the file cannot be written; what was there before is still there.
    """
    tensors, plain = collect(parts, passes)
    metadata = {"format": _FORMAT, **owner.metadata(), "state": json.dumps(plain)}
    metadata[_CHECKSUM] = checksum(tensors, metadata)
    with whole_file(path, "a cache") as scratch:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, metadata)
        except SafetensorError as error:
            # What it says of a disk.
            raise OSError(str(error)) from error
        # The name must not be there before the content, or a loss of power leaves neither the old nor the new.
        with open(scratch, "rb") as written:
            os.fsync(written.fileno())


def load(parts: CacheParts, owner: Owner, path: Path, device: torch.device) -> int:
    """Fill a new cache with what `save` wrote, and return how many passes it has seen.

    Raises:
        InputError: when the file is missing or not a saved cache.
        MismatchError: when it was written with another model or policy.
    """
    if not path.is_file():
        raise InputError(f"no saved cache at {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in (_FORMAT, _FORMER, _UNCHECKED):
                raise InputError(f"{str(path)!r} is not a cache saved by this version of headwise ({_FORMAT})")
            owner.check(metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"{str(path)!r} is not a safetensors file: {error}") from error
    told = metadata.pop(_CHECKSUM, None)
    if metadata["format"] != _UNCHECKED and told != checksum(tensors, metadata):
        raise InputError(f"{str(path)!r} is damaged: its content is not what was saved; save the cache again")
    try:
        plain = json.loads(metadata["state"])
        check_saved(parts, read_facts(owner.model)[0].layers, tensors, plain)
        return fill(parts, {name: tensor.to(device) for name, tensor in tensors.items()}, plain)
    except InputError as error:
        raise InputError(f"{str(path)!r} is {error}") from error
    except (LookupError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not a sound saved cache: {type(error).__name__}: {error}") from error


def collect(parts: CacheParts, passes: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies of everything a cache holds, by name: tensors, and what is plain data.

    Raises:
        CacheStateError: when a prompt is still coming in.
    """
    tensors = {f"{_LOG}.{name}": tensor for name, tensor in parts.log.tensors().items()}
    if parts.kinds is not None and parts.kinds.ids is not None:
        tensors["kinds.ids"] = parts.kinds.ids
    plain: dict[str, Any] = {"columns": parts.log.columns, "passes": passes}
    for index, layer in enumerate(parts.layers):
        if isinstance(layer, HeadwiseLayer):
            # After assisted decoding the last tokens still wait for a crop that will not come.
            state, plain[str(index)] = layer.state()
        else:
            state, plain[str(index)] = stock_state(layer)
        tensors.update({f"layers.{index}.{name}": tensor for name, tensor in state.items()})
    return {name: tensor.clone() for name, tensor in tensors.items()}, plain


def fill(parts: CacheParts, tensors: dict[str, Tensor], plain: dict[str, Any]) -> int:
    """Give a new cache what `collect` took from another of the same model and policy; returns its count of passes."""
    owned: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, field = name.rpartition(".")
        owned.setdefault(part, {})[field] = tensor
    parts.log.restore(plain["columns"], owned.get(_LOG, {}))
    if parts.kinds is not None:
        parts.kinds.ids = owned.get("kinds", {}).get("ids")
    for index, layer in enumerate(parts.layers):
        state = owned.get(f"layers.{index}", {})
        if isinstance(layer, HeadwiseLayer):
            layer.restore(state, plain.get(str(index), {}))
        else:
            restore_stock(layer, state, plain[str(index)])
    passes: int = plain["passes"]
    return passes


def refuse_pickling(cache: Any, _: Any) -> NoReturn:
    """Takes the place of what `pickle`, `torch.save` and processes ask a cache for.

    Raises:
        CacheStateError: always; saying what to do.
    """
    raise CacheStateError(
        f"a {type(cache).__name__} is bound to its model and cannot be pickled: write it with cache.save(path) and, "
        "where the model is, read it with HeadwiseCache.load(path, model, policy); copy.deepcopy(cache) copies it"
    )


def _as_before(policy: str) -> str:
    """A policy as it was written when all fractions were of the prompt, of which tokens were chosen once."""
    policy = re.sub(r"of='prompt', choose_every=\d+, ", "", policy).replace(", of='prompt')", ")")
    # A count is the same whatever a fraction would be of.
    return re.sub(r"\(([^()]*), of='seen'\)", lambda s: s[0] if re.search(r"=[01]\.\d", s[1]) else f"({s[1]})", policy)


def _current(policy: str) -> str:
    """A policy as it was written down, with the names that classes have now."""
    for former, name in FORMER_CLASSES.items():
        policy = re.sub(rf"\b{former}\(", f"{name}(", policy)
    return policy
