"""Adapters: a model that PEFT has changed -> what a cache must know of it, found without PEFT."""

from __future__ import annotations

from torch import nn

from headwise.errors import UnsupportedModelError

# Adapters that are keys and values of tokens that are not there; PEFT makes a cache of them for each generation.
_CACHES = ("PREFIX_TUNING", "CARTRIDGE")


def check_adapter(model: nn.Module) -> None:
    """Refuse a model whose adapter puts another cache in the place of any that it is given.

    Raises:
        UnsupportedModelError: naming the adapter.
    """
    kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    if kind in _CACHES:
        raise UnsupportedModelError(
            f"{type(model).__name__} has an adapter of type {kind.value}, for which PEFT makes a cache of its own and "
            "passes over the one it is given; generate without past_key_values, or use another kind of adapter"
        )


def active_adapters(model: nn.Module) -> str:
    """Names of the adapters that are in use, which no weight tells; empty without any."""
    names = {
        name
        for module in model.modules()
        if getattr(module, "disable_adapters", True) is False
        # A method of models of transformers has the same name.
        for name in getattr(module, "active_adapters", ())
        if name not in getattr(module, "merged_adapters", ())
    }
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        names.add(model.active_adapter)
    return ", ".join(sorted(names))
