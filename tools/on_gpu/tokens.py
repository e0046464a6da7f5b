"""Tokens: models with random weights -> whether headwise, step by step and captured, writes what it should.

Where everything is kept that is what transformers' own cache writes; elsewhere what the reference kernels make of the
same policy. Logits are compared on the same tokens, and ids may differ only where the best two are closer to each other
than rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import headwise
from headwise.hosts.transformers.graph import DecodeGraph
from headwise.measure.model_info import Shape
from headwise.measure.stock_caches import dynamic_cache
from headwise.policies.words import in_bits
from on_gpu.cases import Case, Figures, Setting, Wrong
from on_gpu.models import DEFAULT, SMALL, prompt, sharp_model

# Of logits, as a share of how far they lie from their mean.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}
# What policies choose among depends on sums that are rounded: of equals another one may be taken.
_CHOOSING = 0.2

_SHAPES = {"default shape": DEFAULT, "small Llama": SMALL}
_LADDER = "local", "local+frequent", "full"

POLICIES: dict[str, headwise.Policy] = {
    "full": headwise.Full(),
    "window": headwise.StreamingLLM(window=0.5, sinks=4),
    "h2o": headwise.H2O(heavy=0.25, recent=0.25),
    "full, int8": in_bits(headwise.Full(), "int8"),
    "h2o, int4": in_bits(headwise.H2O(heavy=0.25, recent=0.25), "int4"),
    "snapkv": headwise.SnapKV(keep=0.5),
    "fastgen": headwise.FastGen(0.7, ladder=_LADDER),
}
# Those that keep the same whatever is rounded how.
_FIXED = "full", "window", "full, int8"


@dataclass(frozen=True)
class Check:
    """A model and a policy.

    Attributes:
        captured: whether its step is captured.
        padded: whether one sequence is shorter than the others.
    """

    shape: str
    dtype: torch.dtype
    policy: str
    captured: bool
    padded: bool = False

    @property
    def name(self) -> str:
        """For people."""
        words = [self.shape, str(self.dtype).removeprefix("torch."), self.policy]
        return ", ".join([*words, "captured" if self.captured else "eager", *(["padded"] if self.padded else [])])

    def run(self, setting: Setting) -> Figures:
        """Logits on the tokens of who is right, and ids."""
        model = _model(_SHAPES[self.shape], self.dtype, setting)
        length, steps = (24, 4) if setting.tiny else (700, 48)
        ids = prompt(model, 2, length)
        mask = torch.ones_like(ids)
        if self.padded:
            mask[1, : length // 3] = 0
        policy = POLICIES[self.policy]
        right = dynamic_cache(model) if self.policy == "full" else _cache(model, policy, "reference")
        expected = _play(model, right, ids, mask, steps, None, None)
        tokens = expected.argmax(dim=-1)
        capture = _capture(setting) if self.captured else None
        found = _play(model, _cache(model, policy, "triton"), ids, mask, steps, tokens, capture)
        return self._judge(found, expected)

    def _judge(self, found: torch.Tensor, expected: torch.Tensor) -> Figures:
        size = float((expected - expected.mean(dim=-1, keepdim=True)).square().mean().sqrt())
        off = (found - expected).abs().amax(dim=-1)
        best, second = expected.topk(2, dim=-1).values.unbind(dim=-1)
        differ = found.argmax(dim=-1) != expected.argmax(dim=-1)
        # Both logits may be off.
        excused = best - second <= 2 * off
        tolerance = _TOLERANCE[self.dtype] if self.policy in _FIXED else _CHOOSING
        figures = {
            "tokens": differ.numel(),
            "ids_that_differ": int(differ.sum()),
            "largest_logit_error": float(off.max()) / size,
            "tolerance": tolerance,
        }
        if not bool(found.isfinite().all()):
            raise Wrong("logits are not finite", **figures)
        if not float(off.max()) <= tolerance * size:
            step, sequence = divmod(int(off.argmax()), off.shape[1])
            raise Wrong(f"logits differ, the most at step {step} of sequence {sequence}", **figures)
        if bool((differ & ~excused).any()):
            raise Wrong("ids differ by more than rounding", **figures)
        return figures


@functools.lru_cache(maxsize=1)
def _model(shape: Shape, dtype: torch.dtype, setting: Setting) -> Any:
    return sharp_model(shape, dtype, setting)


def _cache(model: Any, policy: headwise.Policy, kernel: str) -> headwise.HeadwiseCache:
    return headwise.HeadwiseCache(model, policy, kernel=kernel)


def _capture(setting: Setting) -> Callable[..., Any]:
    """For a GPU, what `DecodeGraph` does by itself; on a CPU the step runs again."""
    if setting.device.type == "cuda":
        return DecodeGraph
    return partial(DecodeGraph, capture=lambda step: step)


def _play(
    model: Any,
    cache: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    steps: int,
    tokens: torch.Tensor | None,
    capture: Callable[..., Any] | None,
) -> torch.Tensor:
    """Logits `[steps, b, v]` behind the prompt and behind each token but the last: the likeliest, or those given.

    Args:
        capture: makes what takes the steps; None for plain passes.
    """
    with torch.no_grad():
        at = (mask.cumsum(dim=1) - 1).clamp(min=0)
        given = {"attention_mask": mask, "position_ids": at, "past_key_values": cache}
        logits = [model(input_ids=ids, **given).logits[:, -1]]
        graph = None if capture is None else capture(model, cache)
        for step in range(steps - 1):
            token = (logits[-1].argmax(dim=-1) if tokens is None else tokens[step])[:, None]
            if graph is not None:
                logits.append(graph.step(token).clone())
                continue
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            at = mask.sum(dim=1, keepdim=True) - 1
            given = {"attention_mask": mask, "position_ids": at, "past_key_values": cache}
            logits.append(model(input_ids=token, **given).logits[:, -1])
        if graph is not None:
            graph.close()
    return torch.stack(logits).float()


def cases(setting: Setting) -> list[Case]:
    """What matters most first: everything kept, in fp32, against transformers; models stay together."""
    fp32, bf16 = torch.float32, torch.bfloat16
    both = (False, True)
    checks = [Check("default shape", fp32, policy, captured) for policy in POLICIES for captured in both]
    checks += [Check("default shape", fp32, "full", captured, padded=True) for captured in both]
    checks += [Check("small Llama", fp32, policy, captured) for policy in ("full", "h2o, int4") for captured in both]
    checks += [Check("default shape", bf16, policy, captured) for policy in _FIXED for captured in both]
    checks += [Check("small Llama", torch.float16, "full", captured) for captured in both]
    return [Case(check.name, partial(check.run, setting)) for check in checks]
