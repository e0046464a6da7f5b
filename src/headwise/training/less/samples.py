"""Samples: what layers were asked, sequence by sequence -> files, read in any order without filling the memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headwise.files import write_text
from headwise.training.less.capture import Captured
from headwise.types import Tensor

# One row per query of a sequence, and one per evicted token.
_ASKED = ("query", "exact", "target", "lse", "stage")
_EVICTED = ("keys", "values", "fold")

_INDEX = "index.json"


class Samples:
    """Memory-mapped arrays of every layer; floats in half precision but for the logarithms.

    Args:
        folder: where they are, or will be.
        rows, columns: room in every layer for query rows and for evicted tokens.

    Attributes:
        sequences: how many are in.
    """

    def __init__(self, folder: Path, rows: int, columns: int) -> None:
        self._folder = folder
        self._room = {**dict.fromkeys(_ASKED, rows), **dict.fromkeys(_EVICTED, columns)}
        self._arrays: dict[tuple[int, str], np.memmap[Any, Any]] = {}
        self.sequences = 0
        # Of every layer: query rows and evicted tokens of each sequence.
        self._counts: dict[int, list[tuple[int, int]]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / _INDEX).is_file():
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            self.sequences = index["sequences"]
            self._counts = {int(layer): [tuple(c) for c in counts] for layer, counts in index["counts"].items()}

    def append(self, captured: dict[int, Captured | None]) -> None:
        """Take in one sequence, of all layers; what was begun and not finished is overwritten once it is read again."""
        for layer, found in captured.items():
            counts = self._counts.setdefault(layer, [])
            asked, evicted = (sum(count[i] for count in counts) for i in range(2))
            if found is None:
                counts.append((0, 0))
                continue
            for name, tensor in _by_row(found).items():
                start = asked if name in _ASKED else evicted
                array = self._array(layer, name, tensor)
                array[start : start + len(tensor)] = tensor.numpy()
            counts.append((found.query.shape[3], found.keys.shape[2]))
        self.sequences += 1
        for array in self._arrays.values():
            array.flush()
        whole = json.dumps({"sequences": self.sequences, "counts": self._counts})
        write_text(self._folder / _INDEX, whole)

    @property
    def layers(self) -> list[int]:
        """Those that evicted anything at all."""
        return [layer for layer in sorted(self._counts) if self.of_layer(layer)]

    def of_layer(self, layer: int) -> list[int]:
        """Numbers of the sequences of which that layer evicted something."""
        return [number for number, (asked, _) in enumerate(self._counts.get(layer, ())) if asked]

    def batch(self, layer: int, sequences: Sequence[int], device: torch.device) -> Captured:
        """Those sequences side by side, padded to the one that evicted most."""
        counts = self._counts[layer]
        longest = max(counts[number][1] for number in sequences)
        parts: dict[str, list[Tensor]] = {}
        for number in sequences:
            before = [sum(count[i] for count in counts[:number]) for i in range(2)]
            for name in (*_ASKED, *_EVICTED):
                which = 0 if name in _ASKED else 1
                start, count = before[which], counts[number][which]
                rows = torch.from_numpy(np.array(self._array(layer, name)[start : start + count]))
                if which:
                    missing = longest - count
                    rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
                parts.setdefault(name, []).append(rows)
        whole = {name: torch.stack(rows).to(device) for name, rows in parts.items()}
        return Captured(
            **{name: whole[name].float().permute(0, 2, 3, 1, 4) for name in ("query", "exact", "target")},
            lse=whole["lse"].permute(0, 2, 3, 1),
            stage=whole["stage"].long(),
            **{name: whole[name].float().transpose(1, 2) for name in ("keys", "values")},
            fold=whole["fold"].long().transpose(1, 2),
        )

    def _array(self, layer: int, name: str, like: Tensor | None = None) -> np.memmap[Any, Any]:
        if (layer, name) not in self._arrays:
            path = self._folder / f"{layer:03d}-{name}.npy"
            if path.is_file():
                array = np.lib.format.open_memmap(path, mode="r+")
            else:
                assert like is not None
                shape = (self._room[name], *like.shape[1:])
                array = np.lib.format.open_memmap(path, mode="w+", dtype=like.numpy().dtype, shape=shape)
            self._arrays[layer, name] = array
        return self._arrays[layer, name]


def sample_bytes(rows: int, columns: int, heads: int, group: int, key_dim: int, value_dim: int) -> int:
    """Bytes that so many query rows and evicted tokens take in one layer."""
    asked = heads * group * (2 * (key_dim + 2 * value_dim) + 4) + 2
    return rows * asked + columns * heads * (2 * (key_dim + value_dim) + 2)


def _by_row(captured: Captured) -> dict[str, Tensor]:
    """Of the only sequence: every array with its rows first."""
    c = captured
    whole = {name: getattr(c, name)[0].permute(2, 0, 1, 3).half() for name in ("query", "exact", "target")}
    whole |= {"lse": c.lse[0].permute(2, 0, 1).float(), "stage": c.stage[0].short()}
    whole |= {name: getattr(c, name)[0].transpose(0, 1).half() for name in ("keys", "values")}
    whole["fold"] = c.fold[0].T.short()
    return {name: tensor.cpu().contiguous() for name, tensor in whole.items()}
