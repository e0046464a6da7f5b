"""Holdings: a cache of one sequence -> which token every KV head holds at one moment, how, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headwise.errors import ConfigurationError
from headwise.hosts.transformers.cache import HeadwiseCache
from headwise.stages.layer import LayerCache

# What stands for a token that a head does not hold; exact rows come next, then each format.
GONE, EXACT = 0, 1


@dataclass(frozen=True)
class Holdings:
    """What the heads of all compressed layers hold, layer by layer; c heads in all.

    Attributes:
        seen: tokens that the model was given, t of them.
        held: of every head and token `GONE`, `EXACT`, or 2 and more for the formats of the policy in their order.
        head_bytes: of the rows of every head.
        full_head_bytes: what each would take in a full cache.
        rules: of every head.
        allocated_bytes, full_bytes: of the whole cache.
    """

    seen: int
    held: npt.NDArray[np.uint8]
    head_bytes: list[int]
    full_head_bytes: list[int]
    rules: list[str]
    allocated_bytes: int
    full_bytes: int

    @classmethod
    def of(cls, cache: HeadwiseCache) -> Holdings:
        """What it holds now.

        Raises:
            ConfigurationError: when it has several sequences, or no layer of it is compressed.
        """
        layers = [layer.core for layer in cache.headwise_layers]
        if not layers:
            raise ConfigurationError("there are no heads to show: no layer of this model is compressed")
        seen, report = cache.get_seq_length(), cache.report()
        parts = [_of_layer(layer, seen) for layer in layers]
        rules = [rule for names in report.rules if names is not None for rule in names[0].tolist()]
        return cls(
            seen,
            np.concatenate([held for held, _ in parts]),
            [count for _, counts in parts for count in counts],
            [seen * layer.full_row_bytes for layer, (held, _) in zip(layers, parts, strict=True) for _ in held],
            rules,
            report.allocated_bytes,
            report.full_bytes,
        )


def formats_of(cache: HeadwiseCache) -> list[tuple[str, float]]:
    """Names of the ways in which rows may be stored, exact ones first, and bits of a number on average."""
    dtype = cache.headwise_layers[0].core.store.exact.pools["keys"].dtype  # type: ignore[union-attr]  # after a prompt
    named = [(str(dtype).removeprefix("torch."), 8.0 * dtype.itemsize)]
    precision = cache.policy.precision
    return named + [(str(f), (f.key_bits + f.value_bits) / 2) for f in (() if precision is None else precision.formats)]


def cells_of(cache: HeadwiseCache) -> list[tuple[int, int]]:
    """Layer of the model, and KV head, of every head that `Holdings` has."""
    found = []
    for layer in cache.headwise_layers:
        heads = layer.core.store.heads[1]  # type: ignore[union-attr]  # after a prompt
        found += [(layer.core.config.index, head) for head in range(heads)]
    return found


def _of_layer(layer: LayerCache, seen: int) -> tuple[npt.NDArray[np.uint8], list[int]]:
    store = layer.store
    if store is None or store.heads[0] != 1:
        what = "nothing was read yet" if store is None else f"it has {store.heads[0]} sequences"
        raise ConfigurationError(f"what a cache holds can be shown of one sequence, and {what}")
    held = np.zeros((store.heads[1], seen), dtype=np.uint8)
    columns, there, kinds = store.kept_columns()[0].cpu(), store.occupied()[0].cpu(), store.row_formats().cpu()
    for head, own in enumerate(there):
        held[head, columns[head][own].numpy()] = kinds[own].numpy() + 2
    sizes = np.array([0, *store.row_bytes])
    return held, sizes[held.astype(np.int64)].sum(axis=1).tolist()
