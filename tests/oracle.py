"""The masked oracle: keeps every key and value, masks what was evicted, and computes everything the long way.

It shares the rules' formulas with the package and nothing else: dense tensors, t x t attention maps, one mask.
"""

from __future__ import annotations

import torch

from headwise.policies import Full
from headwise.policies.tokens import Tokens


class OracleCore:
    """Takes the place of a `LayerCache` behind a `HeadwiseLayer`."""

    def __init__(self, core):
        self.index, self.policy, self.log = core.index, core.config.policy, core.log
        self.steering = core.config.steering
        self.evict_every = core.config.cache.evict_every
        self.seen = 0
        self.recording = False
        self.readers_left = 0
        self.restorable = True
        self.plan = None
        self.keys = self.alive = None

    def attend(self, query, keys, values, mask, options):
        b, h, q, _ = keys.shape
        g = query.shape[2]
        if self.log.columns == self.seen:
            real = None if mask is None else mask.diagonal(self.seen, -2, -1)
            self.log.extend(b, q, real, keys.device)
        old = self.seen
        self.seen += q
        if self.keys is None:
            self.keys, self.values = keys[:, :, :0], values[:, :, :0]
            self.alive = torch.ones(b, h, 0, dtype=torch.bool)
            self.real = torch.ones(b, 0, dtype=torch.bool)
        self.keys = torch.cat([self.keys, keys], 2)
        self.values = torch.cat([self.values, values], 2)
        self.alive = torch.cat([self.alive, torch.ones(b, h, q, dtype=torch.bool)], 2)
        if mask is None:
            mask = torch.ones(b, q, self.seen, dtype=torch.bool).tril(old)
        self.real = torch.cat([self.real, mask.diagonal(old, -2, -1)], 1)

        visible = mask[:, None] & self.alive[:, :, None]
        weights = torch.zeros(b, h, g, q, self.seen)
        out = torch.zeros(b, h, g, q, values.shape[-1])
        for i in range(b):
            for j in range(h):
                for head in range(g):
                    logits = query[i, j, head].double() @ self.keys[i, j].double().T * options.scaling
                    logits = logits + self._added(i, j, head)
                    p = logits.masked_fill(~visible[i, j], float("-inf")).softmax(-1).nan_to_num(0)
                    weights[i, j, head] = p.float()
                    out[i, j, head] = (p @ self.values[i, j].double()).float()
        counted = weights * self.real[:, None, None, old:, None]
        received = counted.sum((2, 3))
        if old == 0:
            self.score = received
            self.prompt = self.real.sum(1)
            self.choice, self.recovered = self._choose(counted)
        else:
            self.score = torch.cat([self.score, torch.zeros(b, h, q)], 2) + received
        valid = self.alive & self.real[:, None]
        if old and self.seen - self.evicted_at < self.evict_every:
            self.alive = valid
            return out
        self.evicted_at = self.seen
        last = torch.zeros_like(valid)
        for index, rung in enumerate(self.policy.rungs):
            kept = rung.keep(self._tokens(valid, self.real.sum(1)[:, None, None] - 1))
            last = last | kept & (self.choice == index)[:, :, None]
        if self.log.marks.pinned is not None:
            last[:, :, : self.log.marks.pinned.shape[1]] |= self.log.marks.pinned[:, None]
        self.alive = last & valid
        return out

    def _added(self, sequence, head, member):
        """What steering adds to the logits of every column."""
        added, marks = torch.zeros(self.seen, dtype=torch.float64), self.log.marks.values
        if self.steering is not None and marks is not None:
            added[: marks.shape[1]] = marks[sequence].double() * float(self.steering.gates[head, member])
        return added

    def _tokens(self, valid, newest):
        b, h, n = valid.shape
        position = (self.real.cumsum(1) - 1).clamp(min=0)[:, None].expand(b, h, n)
        kinds = self.log._kinds
        return Tokens(
            position=position,
            age=newest - position,
            valid=valid,
            pool=valid,
            prompt=self.prompt[:, None, None],
            seen=self.real.sum(1)[:, None, None],
            kind=None if kinds is None else kinds[:, None].expand(b, h, n),
            score=self.score.masked_fill(~valid, 0),
            layer=self.index,
        )

    def _choose(self, weights):
        """Equation 1 by brute force: the formula of each rung for every query row, against the t x t map."""
        b, h, _, t, _ = weights.shape
        rungs, selection = self.policy.rungs, self.policy.selection
        if selection is None:
            return torch.zeros(b, h, dtype=torch.long), None
        valid = self.alive & self.real[:, None]
        position = (self.real.cumsum(1) - 1).clamp(min=0)
        recovered, cost = [], []
        for rung in rungs:
            retained = torch.zeros_like(weights[..., 0])
            for row in range(t):
                kept = rung.keep(self._tokens(valid, position[:, row, None, None]))
                retained[..., row] = (weights[..., row, :] * kept[:, :, None]).sum(-1)
            chosen = self.real
            if selection.last_rows is not None:
                chosen = chosen & (position >= self.prompt[:, None] - selection.last_rows)
            mean = (retained * chosen[:, None, None]).sum(-1) / chosen.sum(1)[:, None, None]
            recovered.append(mean.amin(-1) if selection.fold == "min" else mean.mean(-1))
            last_row = self._tokens(valid, self.prompt[:, None, None] - 1)
            cost.append((rung.keep(last_row) & valid).sum(-1))
        choice = torch.zeros(b, h, dtype=torch.long)
        for i in range(b):
            for j in range(h):
                enough = [
                    r
                    for r, rung in enumerate(rungs)
                    if isinstance(rung, Full) or (selection.recovery < 1 and recovered[r][i, j] >= selection.threshold)
                ]
                choice[i, j] = min(enough, key=lambda r: (int(cost[r][i, j]), r))
        return choice, torch.stack(recovered)


def use_oracle(cache):
    """Replace the core of every layer of a fresh cache."""
    for layer in cache.headwise_layers:
        layer.core = OracleCore(layer.core)
    return cache


def rows_of(core):
    """The columns that every head keeps, as sets."""
    if hasattr(core, "alive"):
        return [[set(head.nonzero().flatten().tolist()) for head in sequence] for sequence in core.alive]
    columns, occupied = core.store.kept_columns(), core.store.occupied()
    return [[set(c[o].tolist()) for c, o in zip(cs, os, strict=True)] for cs, os in zip(columns, occupied, strict=True)]


def scores_of(core, oracle):
    """Accumulated scores of every kept row, as the store has them and as the oracle has them."""
    occupied = core.store.occupied()
    columns = core.store.kept_columns().masked_fill(~occupied, 0).long()
    return core.store.kept_scores()[occupied], oracle.score.gather(2, columns)[occupied]
