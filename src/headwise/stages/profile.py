"""2/7 profile: queries and keys of the prompt, pass by pass -> observations -> the evidence that policies choose by.

Observations own no keys and values: whoever holds the rows shows them.
"""

from __future__ import annotations

from functools import partial

import torch

from headwise.contract import LayerShape
from headwise.kernels.interface import AttentionMap
from headwise.matching.references import References, sampled
from headwise.matching.targets import Targets
from headwise.policies.evidence import Evidence
from headwise.quant.codes import span
from headwise.stages.bearable import JUDGES, bearable_formats
from headwise.stages.config import LayerConfig
from headwise.stages.mass_profile import MassProfile
from headwise.stages.prompt_mass import PromptMass
from headwise.stages.prompt_queries import PromptQueries
from headwise.stages.repetition import attend_repetition
from headwise.stages.steered import LayerMarks
from headwise.stages.token_log import TokenLog
from headwise.store.row_parts import row_bytes, row_parts
from headwise.types import Bool, Float, Int, Tensor


class Observations:
    """What profiling has seen of one layer's prompt.

    Args:
        config: of the layer.
        log: of the tokens, shared by all layers.

    Attributes:
        mass: attention mass by column.
        repetition_peaks: largest attention that each column got while the model repeated the prompt, or what a gate
            predicted of it when it was asked for.
        asked: the newest queries, as far as the policy looks at them.
        references: queries that the values of kept rows are fitted to; None where they stay their own.
    """

    def __init__(self, config: LayerConfig, log: TokenLog) -> None:
        self._config, self._log, self._marks = config, log, LayerMarks(config.steering, log.marks)
        self.mass = PromptMass(config, log)
        self.clear()

    def clear(self) -> None:
        """Let go of everything but the count of rows."""
        self.mass.profile = None
        self.repetition_peaks: Float[Tensor, "b h t"] | None = None
        self.references: References | None = None
        self._targets: dict[tuple[int, int], Targets] | None = None
        self.asked = PromptQueries()

    def tensors(self) -> list[Tensor]:
        """Every tensor it holds on to."""
        held = [] if self.mass.profile is None else self.mass.profile.tensors()
        held += self.asked.tensors()
        if self.references is not None:
            held += self.references.tensors()
        for targets in (self._targets or {}).values():
            held += targets.tensors()
        return held if self.repetition_peaks is None else [*held, self.repetition_peaks]

    def observe(self, map: AttentionMap, mass: MassProfile | None = None) -> None:
        """Look at the newest columns of all that have come in.

        Args:
            mass: what these columns give to all, where it is known.
        """
        policy = self._config.policy
        if self.mass.looked_at:
            self.mass.add(map, mass)
        precision = self._config.cache.precision
        judged = JUDGES if precision is not None and precision.adapts else 0
        if policy.needs_evidence or judged:
            rows = policy.query_rows if policy.needs_evidence else 0
            later = 0 if self._config.again is None else self._config.again.queries
            # Where it comes in one pass, all are there anyway, until the layer is compacted at its end.
            whole = rows is None or (self._config.cache.prompt_columns is None and not policy.needs_all_layers)
            self.asked.add(map, None if whole or rows is None else max(rows, judged, later))
        if self._config.cache.matching is not None:
            prompt = self._config.cache.prompt_columns or map.keys.shape[2]
            asked = sampled(map, max(1, round(prompt * map.query.shape[2] / self._config.cache.matching.queries)))
            self.references = asked if self.references is None else self.references + asked

    def repeat(
        self, map: AttentionMap, values: Float[Tensor, "b h all e"], prompt: int, chunk: slice
    ) -> Float[Tensor, "b h g q e"]:
        """Attend with tokens that repeat a part of the complete prompt, and note only what they look at.

        Args:
            map: over the columns of the prompt and those of the repetition, all of them.
            prompt: columns of the prompt.
            chunk: of them, which are repeated.
        """
        if self.repetition_peaks is None:
            self.repetition_peaks = torch.zeros(
                *map.keys.shape[:2], prompt, dtype=torch.float32, device=map.keys.device
            )
        output, found = attend_repetition(map, values, chunk, self._config.cache.kernels)
        self.repetition_peaks[:, :, chunk] = self.repetition_peaks[:, :, chunk].maximum(found)
        return output

    def evidence(self, keys: Float[Tensor, "b h t d"], values: Float[Tensor, "b h t e"]) -> Evidence:
        """What the layer holds at the end of the prompt."""
        query, options = self.asked.query, self.asked.options
        positions, real = self.positions(keys)
        length, config, cache = real.sum(dim=1)[:, None, None], self._config, self._config.cache
        if config.gate is not None:
            self.repetition_peaks = config.gate.scores(keys, positions, length, config.rotation)
        newest, dims, dtype = (
            slice(keys.shape[2] - query.shape[3], None),
            (keys.shape[-1], values.shape[-1]),
            cache.dtype or keys.dtype,
        )
        beside, precision = {"scored": config.remembers, "biased": cache.biased}, cache.precision
        gates, marks = self._marks.evidence(self._columns(keys))
        formats = (None, *(() if precision is None else precision.formats))
        counts = 0.0 if cache.matching is None else float(cache.matching.ahead)
        return Evidence(
            query=query,
            read_keys=lambda: keys,
            read_values=lambda: values,
            read_spans=lambda: (span(keys), span(values)),
            value_dim=values.shape[-1],
            asked=real[:, newest],
            query_position=positions[:, newest],
            mask=self.asked.mask,
            options=options,
            position=positions[:, None],
            real=real[:, None],
            length=length,
            rotation=config.rotation,
            repetition_peaks=self.repetition_peaks,
            gates=gates,
            marks=marks,
            row_bytes=tuple(row_bytes(row_parts(*dims, dtype, format, **beside)) for format in formats),
            kv_bytes=LayerShape(1, *dims).token_bytes(dtype),
            ahead=partial(self._ahead, keys, values) if counts > 0 else None,
            ahead_counts=counts,
        )

    def targets(
        self, keys: Float[Tensor, "b h t d"], values: Float[Tensor, "b h t e"]
    ) -> dict[tuple[int, int], Targets] | None:
        """What the prompt gives the references, of every sequence and KV head; None where there are none."""
        if self._targets is None and self.references is not None and self._config.rotation is not None:
            gates, marks = self._marks.added(self._columns(keys))
            steered = gates, None if marks is None else marks[:, 0]
            at = self.positions(keys)
            self._targets = self.references.targets(self._config.rotation, keys, values, *at, *steered)
            self.references = None
        return self._targets

    def _ahead(self, keys: Float[Tensor, "b h t d"], values: Float[Tensor, "b h t e"]) -> Float[Tensor, "b h t"]:
        """The most that any of the references gives each column; 0 for padding."""
        found, targets = torch.zeros_like(keys[..., 0], dtype=torch.float32), self.targets(keys, values)
        real = self.positions(keys)[1]
        for (b, h), head in (targets or {}).items():
            found[b, h, real[b]] = head.peaks
        return found

    def formats(self, keys: Float[Tensor, "b h t d"], values: Float[Tensor, "b h t e"]) -> Int[Tensor, "b h"] | None:
        """The format that every head can bear, of those that it may have; None where there is nothing to choose."""
        precision = self._config.cache.precision
        if precision is None or not (precision.adapts or precision.later is not None):
            return None
        positions, real = self.positions(keys)
        scaling = self.asked.options.scaling
        return bearable_formats(precision, self.asked.query, keys, values, real, positions, scaling)

    def positions(self, keys: Float[Tensor, "b h t d"]) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """Position of every column, and whether it holds a real token."""
        columns = self._columns(keys)
        return self._log.positions(columns)[:, 0], self._log.real(columns)[:, 0]

    def _columns(self, keys: Float[Tensor, "b h t d"]) -> Int[Tensor, "b 1 t"]:
        return torch.arange(keys.shape[2], device=keys.device).expand(len(keys), 1, -1)
