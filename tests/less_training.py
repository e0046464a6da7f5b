"""Training of LESS: layers that are watched, random kernels, and random samples."""

from __future__ import annotations

from itertools import pairwise

import torch

from headwise.kernels.backends import choose
from headwise.stages.config import CacheConfig, LayerConfig
from headwise.stages.token_log import TokenLog
from headwise.training.less.capture import Captured, WatchedLayer
from headwise.training.less.one_layer import TrainableFeatures
from headwise.types import LogitOptions

REFERENCE = choose("reference", torch.device("cpu"))


def watched(policy, evict_every=4, kind=WatchedLayer):
    config = CacheConfig(REFERENCE, 4, None, evict_every)
    return kind(LayerConfig(0, policy, config), TokenLog("kind" in policy.facts))


def random_kernels(heads, group, dim, width=12, features=5):
    kernels = TrainableFeatures(heads, group, dim, width, features)
    with torch.no_grad():
        kernels.scale.uniform_(0.05, 1.05)
        kernels.gain.normal_()
    return kernels


def feed(layer, query, keys, values, first, step):
    """The prompt at once, then pieces."""
    options = LogitOptions(query.shape[-1] ** -0.5)
    outputs = []
    bounds = [0, first, *range(first + step, query.shape[3], step), query.shape[3]]
    for start, stop in pairwise(bounds):
        rows = slice(start, stop)
        outputs.append(layer.attend(query[:, :, :, rows], keys[:, :, rows], values[:, :, rows], None, options))
    return torch.cat(outputs, dim=3)


def random_captured(asked, evicted, group=2):
    fold = torch.randint(1, 4, (1, 2, evicted)).sort(dim=-1).values
    fold[:, 1, evicted // 2 :] = 0
    stage = torch.randint(1, 4, (1, asked)).sort(dim=-1).values
    rows = [torch.randn(1, 2, group, asked, 6).half().float() for _ in range(3)]
    pairs = [torch.randn(1, 2, evicted, 6).half().float() for _ in range(2)]
    return Captured(rows[0], rows[1], torch.randn(1, 2, group, asked), rows[2], stage, *pairs, fold)
