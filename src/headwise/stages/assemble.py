"""Assemble: a policy, what is known of the model, and options -> the configuration of every compressed layer.

Here wrappers around a policy are resolved, once: how rows are stored, what remembers evicted ones, what scores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from headwise.contract import ModelFacts
from headwise.errors import ConfigurationError, UnsupportedModelError
from headwise.gate.checkpoint import check_gates, load_gates, shipped_gates
from headwise.gate.gate import LayerGate
from headwise.kernels.interface import Kernels
from headwise.policies.base import Policy
from headwise.policies.less import Less
from headwise.policies.match import Match
from headwise.policies.wrapper import Wrapper, wrappers
from headwise.stages.config import CacheConfig, LayerConfig
from headwise.steer.steering import BaseSteering, LayerSteering


@dataclass(frozen=True)
class Assembly:
    """What a cache is made from; a copy of it is made from the same.

    Attributes:
        policy: with everything read that it names.
        layers: by index, of the compressed ones.
        steering: None where nothing is steered.
    """

    policy: Policy
    kernels: Kernels
    layers: Mapping[int, LayerConfig]
    steering: BaseSteering | None = None

    @property
    def asks_all_queries(self) -> bool:
        """Whether the policy looks at what layers ask that read the keys of others."""
        return any(layer.asks_queries and layer.readers > 1 for layer in self.layers.values())


def assemble(
    policy: Policy,
    facts: ModelFacts,
    kernels: Kernels,
    *,
    page_size: int,
    prompt_columns: int | None,
    evict_every: int,
    dtype: torch.dtype | None,
    steering: BaseSteering | None = None,
) -> Assembly:
    """The configuration of every layer.

    Raises:
        ConfigurationError: when an option is out of range, or both LESS and Match stand around the policy, or steering
            does not go with it.
        InputError: when there are no trained weights where the policy names some.
        MismatchError: when they are of another model.
        UnsupportedModelError: when the policy looks through a rotary embedding that is not known, or LESS would be for
            several layers at once.
    """
    _check_shared(policy, facts)
    policy, less = _with_kernels(policy, facts.module)
    features = {} if less is None else less.layers
    gates = _gates(policy.chooser, facts.module)
    matching = next((wrapper for wrapper in wrappers(policy) if isinstance(wrapper, Match)), None)
    if matching is not None and less is not None:
        raise ConfigurationError(
            f"{policy}: LESS remembers what is dropped, and Match lets rows that stay stand for it; take one of them"
        )
    cache = CacheConfig(
        kernels, page_size, prompt_columns, evict_every, len(facts.layers), dtype, policy.precision, matching
    )
    steered = {} if steering is None else _steered(steering, policy, matching, facts)
    layers = {
        index: LayerConfig(
            index,
            policy.chooser,
            cache,
            layer.rotation,
            gates.get(index),
            features.get(index),
            layer.readers,
            steered.get(index),
        )
        for index, layer in enumerate(facts.layers)
        if layer.compressed
    }
    _check_rotations(policy.chooser, matching, layers, facts.name)
    return Assembly(policy, kernels, layers, steering)


def _steered(
    steering: BaseSteering, policy: Policy, matching: Match | None, facts: ModelFacts
) -> Mapping[int, LayerSteering]:
    """How every layer is steered that is.

    Raises:
        ConfigurationError: when the policy does not go with it, or heads are named that there are not.
    """
    if any(isinstance(wrapper, Less) for wrapper in wrappers(policy)):
        raise ConfigurationError(
            f"{policy}: LESS folds rows into one state, and steering weighs them one by one; steer without LESS"
        )
    if matching is not None and steering.target is not None:
        raise ConfigurationError(
            f"{policy}: rows are refitted to attention that is known before, and {type(steering).__name__} depends on "
            f"each query; take {matching.policy} without it, or another way of steering"
        )
    return steered_layers(steering, facts)


def steered_layers(steering: BaseSteering, facts: ModelFacts) -> Mapping[int, LayerSteering]:
    """How every layer is steered that is.

    Raises:
        ConfigurationError: when heads are named that there are not, or that cannot be steered.
    """
    shapes = {
        index: (layer.shape.heads, layer.query_heads // layer.shape.heads)
        for index, layer in enumerate(facts.layers)
        # A layer whose keys others read has heads of each of them.
        if layer.compressed and layer.shape is not None and layer.query_heads and layer.readers == 1
    }
    heads = steering.layers(shapes, facts.name)
    return {index: steering.layer(own, shapes[index][1], facts.device) for index, own in heads.items()}


def _check_rotations(chooser: Policy, matching: Match | None, layers: Mapping[int, LayerConfig], name: str) -> None:
    """Refuse to turn queries by a rotary embedding that is not known."""
    unknown = next((index for index, layer in layers.items() if layer.rotation is None), None)
    if unknown is None or not (matching is not None or chooser.needs_rotation):
        return
    turning = chooser if matching is None else matching
    instead = "a policy that looks at attention alone, such as SnapKV"
    if matching is not None:
        instead = f"{matching.policy} without it"
    raise UnsupportedModelError(
        f"{turning} turns queries to positions to come, and how layer {unknown} of {name} makes positions is not "
        f"known; take {instead}"
    )


def _check_shared(policy: Policy, facts: ModelFacts) -> None:
    """Refuse one memory for the queries of several layers."""
    shared = [index for index, layer in enumerate(facts.layers) if layer.compressed and layer.readers > 1]
    if shared and any(isinstance(wrapper, Less) for wrapper in wrappers(policy)):
        raise UnsupportedModelError(
            f"LESS learns a memory for the queries of one layer, and in {facts.name} "
            f"{facts.layers[shared[0]].readers} layers read the keys of layer {shared[0]}; take the policy without it"
        )


def _with_kernels(policy: Policy, model: nn.Module) -> tuple[Policy, Less | None]:
    """A policy with the kernels of LESS read, wherever among its wrappers it stands, and LESS itself."""
    if isinstance(policy, Less):
        loaded = policy.load(model)
        return loaded, loaded
    if not isinstance(policy, Wrapper):
        return policy, None
    inner, found = _with_kernels(policy.policy, model)
    return (policy if found is None else replace(policy, policy=inner)), found


def _gates(policy: Policy, model: nn.Module) -> Mapping[int, LayerGate]:
    """The gates that the policy asks for, by layer and where the model is; none where it asks for none."""
    if policy.gates is False:
        return {}
    gates = load_gates(shipped_gates() if policy.gates is True else Path(policy.gates))
    check_gates(gates, model)
    device = next(model.parameters()).device
    return {index: layer.to(device) for index, layer in gates.layers.items()}
