"""Family verdict: a small model -> whether headwise serves it, refuses it with a reason, or does something wrong."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

import headwise
from headwise.errors import HeadwiseError

PROMPT, NEW, SINKS, WINDOW = 43, 8, 2, 9
_OWNER = "family_verdict_layer"


@dataclass(frozen=True)
class Verdict:
    """What headwise does with a model: "served", "refused", "wrong" or "not built", and more about it."""

    kind: str
    said: str

    def __str__(self) -> str:
        return f"{self.kind:10} {self.said}"


def judge(model: PreTrainedModel) -> Verdict:
    """Try a cache that keeps everything against stock, and one that evicts against stock with a mask."""
    ids = torch.randint(3, 100, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    expected = _generate(model, ids, None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            full, evicting = (
                headwise.HeadwiseCache(model, policy, evict_every=1)
                for policy in (headwise.Full(), headwise.StreamingLLM(window=WINDOW, sinks=SINKS))
            )
    except HeadwiseError as error:
        return Verdict("refused", str(error).split("has nothing to compress: ")[-1].splitlines()[0])
    except Exception as error:
        return Verdict("wrong", f"making a cache raises {type(error).__name__}: {error}"[:200])
    try:
        found = _generate(model, ids, full)
        if not torch.equal(found.sequences, expected.sequences):
            return Verdict("wrong", "with everything kept it gives other ids than transformers' own cache")
        return _evicts_as_masked(model, ids, evicting)
    except Exception as error:
        return Verdict("wrong", f"{type(error).__name__}: {error}"[:200])


class _Marking(DynamicCache):
    """Transformers' own cache; whoever attends to its keys knows of which layer they are."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **options: Any) -> Any:
        """As always."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **options)
        setattr(keys, _OWNER, layer_idx)
        return keys, values


def _evicts_as_masked(model: PreTrainedModel, ids: torch.Tensor, cache: headwise.HeadwiseCache) -> Verdict:
    layers = [layer.core.index for layer in cache.headwise_layers]
    with _windowed(model, layers):
        expected = _generate(model, ids, _Marking(config=model.config))
    found = _generate(model, ids, cache)
    kept = {int(tokens.max()) for tokens in cache.report().kept_tokens if tokens is not None}
    if kept != {SINKS + WINDOW}:
        return Verdict("wrong", f"a window of {SINKS} and {WINDOW} keeps {sorted(kept)}")
    # Behind a token that rounding alone may choose, texts differ.
    upto = int((found.sequences == expected.sequences)[0, PROMPT:].long().cumprod(0).sum()) + 1
    pairs = list(zip(found.logits, expected.logits, strict=True))[:upto]
    if not all(torch.allclose(mine, theirs, atol=2e-3, rtol=2e-3) for mine, theirs in pairs):
        worst = max(float((mine - theirs).abs().max()) for mine, theirs in pairs)
        return Verdict("wrong", f"a window's logits are off by {worst:.2g} from those of stock with a mask")
    # A layer that reads the keys of another has a place in the cache, and nothing there.
    own = [i for i, layer in enumerate(cache.layers) if type(layer).__name__ != "DummyLayer"]
    count, others = len(own), [cache.layers[i] for i in own if i not in layers]
    if not others:
        return Verdict("served", f"all layers of {count}" if count > 1 else "its layer")
    kinds = sorted({type(layer).__name__.removeprefix("Dynamic").removesuffix("Layer") for layer in others})
    return Verdict("served", f"{len(layers)} of {count} layers; the others stay: {', '.join(kinds)}")


def _generate(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache | headwise.HeadwiseCache | None) -> Any:
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=NEW, **options
    )


@contextlib.contextmanager
def _windowed(model: PreTrainedModel, layers: list[int]) -> Iterator[None]:
    """While it lasts, a token behind the prompt sees in those layers the first few, a window before it, and itself."""

    def attend(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        scaling: Any = None,
        softcap: Any = None,
        **options: Any,
    ) -> Any:
        mask, attended, queries, columns = attention_mask, key, query.shape[2], key.shape[2]
        key, value = (rows.repeat_interleave(query.shape[1] // rows.shape[1], dim=1) for rows in (key, value))
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        logits = query @ key.mT * scaling
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if mask is None:
            hidden = torch.ones(queries, columns, dtype=torch.bool).triu(columns - queries + 1)
            logits = logits.masked_fill(hidden, -torch.inf)
        elif mask.dtype is torch.bool:
            logits = logits.masked_fill(~mask[..., :columns], -torch.inf)
        else:
            logits = logits + mask[..., :columns]
        if columns > PROMPT and getattr(attended, _OWNER, None) in layers:
            column = torch.arange(columns)
            logits = logits.masked_fill((column >= SINKS) & (column < columns - WINDOW - 1), -torch.inf)
        sinks = options.get("s_aux")
        if sinks is not None:
            beside = sinks.reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, beside], dim=-1)
        weights = logits.softmax(dim=-1)[..., :columns]
        return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("windowed", attend)
    AttentionMaskInterface.register("windowed", sdpa_mask)
    before = [(config, config._attn_implementation) for config in _configs(model)]
    for config, _ in before:
        config._attn_implementation = "windowed"
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _configs(model: PreTrainedModel) -> list[Any]:
    """The configurations that its modules read, each once."""
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return list(found.values())
