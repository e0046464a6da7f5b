"""Kernels of maps: the Triton kernels that look at a whole prompt -> each against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from headwise.kernels import reference
from headwise.kernels.interface import AttentionMap, Kernels, MassRequest, PeaksRequest
from headwise.types import LogitOptions
from kernel_inputs import some_marks, strided
from on_gpu.cases import Case, Figures, Setting
from on_gpu.compare import Pair, compare

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Map:
    """One attention map, whose columns are summed up.

    Attributes:
        total: columns.
        first: column of the first query row.
        bands: windows in which the mass is summed up too.
        sampled: whether only some rows are read.
    """

    dtype: torch.dtype = BF16
    total: int = 2000
    first: int = 0
    heads: tuple[int, int, int] = (2, 2, 4)
    dim: int = 128
    bands: int = 1
    masked: bool = False
    sampled: bool = False
    softcap: float | None = None
    sinks: bool = False
    marked: bool = False

    @property
    def name(self) -> str:
        """What is special about it."""
        words = [
            f"{str(self.dtype).removeprefix('torch.')}, {self.total} columns from {self.first}, {self.dim} channels"
        ]
        words += [f"group {self.heads[2]}, {self.bands} bands"]
        flags = ("masked", "sampled", "softcap", "sinks", "marked")
        return ", ".join([*words, *(flag for flag in flags if getattr(self, flag))])

    def request(self, setting: Setting) -> MassRequest:
        """Everything random, in every sequence something else."""
        total, dim, (batch, heads, group) = self.total, self.dim, self.heads
        if setting.tiny:
            total, dim, heads, group = 70, min(dim, 32), 1, 2
        torch.manual_seed(0)
        with torch.device(setting.device):
            # The second sequence is padded in front.
            real = torch.arange(total) >= torch.arange(batch)[:, None] * (21 if self.masked else 0)
            columns = torch.arange(min(self.first, total // 2), total)
            if self.sampled:
                columns = columns[torch.rand(len(columns)) < 0.4]
            mask = None
            if self.masked:
                seen = torch.ones(total, total, dtype=torch.bool).tril() & real[:, None] & real[:, :, None]
                mask = seen[:, columns]
            weights = torch.rand(batch, total)[:, columns] * real[:, columns]
            options = LogitOptions(0.3, self.softcap, torch.randn(heads, group) if self.sinks else None)
            query = strided(batch, heads, group, len(columns), dim, dtype=self.dtype)
            keys = strided(batch, heads, total, dim, dtype=self.dtype)
            widths = torch.tensor([[20, 7], [1, 60], [100, 33]])[: self.bands, :batch]
            marks = some_marks(batch, heads, group, len(columns), total) if self.marked else None
            map = AttentionMap(query, keys, mask, options, columns, marks)
            return MassRequest(map, weights, (real.cumsum(1) - 1).clamp(min=0), widths)

    def check_mass(self, setting: Setting, kernels: Kernels) -> Figures:
        """The sums of columns."""
        request = self.request(setting)
        (mass, band), (expected_mass, expected_band) = (k.column_mass(request) for k in (kernels, reference))
        return compare([Pair("mass", mass, expected_mass, 2e-5, 2e-4), Pair("band", band, expected_band, 2e-5, 2e-4)])

    def check_peaks(self, setting: Setting, kernels: Kernels) -> Figures:
        """Attention of the newest rows, and the largest numbers of columns in a part of them."""
        map = self.request(setting).map
        total = map.keys.shape[2]
        newest = AttentionMap(map.query, map.keys, map.mask, map.options, None, map.marks)
        with torch.device(setting.device):
            values = strided(*map.keys.shape[:3], self.dim, dtype=self.dtype)
        asked = PeaksRequest(newest, values, [slice(0, 4), slice(total // 4, total // 2), slice(total - 30, total)])
        (output, peaks), (expected, expected_peaks) = (k.attention_and_peaks(asked) for k in (kernels, reference))
        return compare([Pair("output", output, expected, 1e-6, 1e-4), Pair("peaks", peaks, expected_peaks, 2e-5, 2e-4)])


MASSES = (
    Map(),
    Map(total=4100, bands=0),
    Map(FP32, dim=64, heads=(2, 3, 3)),
    Map(bands=2, sampled=True),
    Map(masked=True, bands=2),
    Map(FP16, dim=64, bands=3, sinks=True),
    Map(softcap=30.0, dim=256, heads=(1, 2, 2)),
    Map(marked=True),
    Map(FP32, dim=80, masked=True, bands=2, softcap=2.0, sinks=True, heads=(2, 1, 2)),
    Map(total=1000, first=900),
    Map(FP32, dim=20, sampled=True, marked=True, masked=True, bands=3, heads=(2, 2, 3)),
)
# Where nothing is masked and rows are all there, torch's fused attention gives the output.
PEAKS = (Map(first=1936), Map(FP32, first=1900, dim=64, heads=(2, 3, 3)), Map(first=1936, marked=True), Map(sinks=True))


def map_cases(setting: Setting, kernels: Kernels) -> list[Case]:
    """All kernels that sum up columns."""
    masses = [Case(f"column mass, {one.name}", partial(one.check_mass, setting, kernels)) for one in MASSES]
    peaks = [Case(f"peaks, {one.name}", partial(one.check_peaks, setting, kernels)) for one in PEAKS]
    return [masses[0], peaks[0], *masses[1:], *peaks[1:]]
