"""Graph: a model and its filled cache -> a decode step that is captured once and replayed, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from headwise.errors import CacheStateError, ConfigurationError, InputError, UnsupportedModelError
from headwise.hosts.transformers.cache import HeadwiseCache
from headwise.hosts.transformers.layer import HeadwiseLayer
from headwise.hosts.transformers.positions import check_counted
from headwise.stages.ambient import alone
from headwise.stages.capture import advance, begin_capture, end_capture
from headwise.types import Float, Int, Tensor

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def cuda_graph(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record what `step` launches; the result launches it again, and returns the same tensor with new content."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class DecodeGraph:
    """Decodes token by token without launching each operation anew, which is what most of a step costs on a GPU.

    Lengths, page tables and the column counter live on the device; the rules are applied between two replays, every
    `evict_every` tokens. Memory for `room` tokens per head is taken beforehand, and the step is captured again when
    it is used up. While one is open the cache must not be used otherwise; `close()` gives it back, as leaving a
    `with` block does.

    Args:
        model: the model the cache was made for.
        cache: one that has seen a prompt, left-padded where sequences differ in length.
        room: tokens between two captures.
        capture: turns the step into something that repeats it; for a GPU, `cuda_graph`.

    Raises:
        UnsupportedModelError: when layers of the model keep their own cache, which cannot be captured.
        ConfigurationError: when the model is not on a GPU and no `capture` is given, or `room` is less than 1.
        CacheStateError: when the prompt is not in, or its positions were not those of its tokens in order.
    """

    @alone
    def __init__(
        self, model: PreTrainedModel, cache: HeadwiseCache, *, room: int = 256, capture: Capture | None = None
    ) -> None:
        # A hybrid layer has states that the trial of a step would change.
        if any(type(layer) is not HeadwiseLayer for layer in cache.layers):
            raise UnsupportedModelError("a step can be captured only where every layer's cache is headwise's alone")
        if capture is None and model.device.type != "cuda":
            raise ConfigurationError(f"CUDA graphs need a model on a GPU, this one is on {model.device}")
        if room < 1:
            raise ConfigurationError(f"room must be a count of 1 or more, got {room}")
        kept = cache.headwise_layers[0].core.kept_tokens
        if cache.get_seq_length() == 0 or kept is None:
            raise CacheStateError("a step can be captured once the prompt is in")
        check_counted(cache)
        self._model, self._cache = model, cache
        self._room, self._left = room, 0
        self._capture = cuda_graph if capture is None else capture
        self._replay: Callable[[], Tensor] | None = None
        batch, device = len(kept), model.device
        seen = cache.get_seq_length()
        self._ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._column = torch.full((1,), seen, dtype=torch.int32, device=device)
        self._positions = cache.token_log.real_tokens(batch, seen, device)[:, None].clone()

    @torch.no_grad()
    def step(self, input_ids: Int[Tensor, "b 1"]) -> Float[Tensor, "b v"]:
        """Logits after one more token of every sequence; the next call overwrites them.

        Raises:
            InputError: when it is not one token per sequence.
        """
        if input_ids.shape != self._ids.shape:
            raise InputError(f"a step takes ids of shape {tuple(self._ids.shape)}, got {tuple(input_ids.shape)}")
        self._ids.copy_(input_ids)
        if self._left == 0:
            self._prepare()
        assert self._replay is not None
        self._cache.announce(self._ids)
        logits = self._replay()
        self._left -= 1
        for layer in self._cache.headwise_layers:
            advance(layer.core, self._left)
        self._cache.whole_model.choose(self._left)
        return logits

    def close(self) -> None:
        """Give the cache back for passes of any kind."""
        self._replay, self._left = None, 0
        self._cache.captured = False
        for layer in self._cache.headwise_layers:
            end_capture(layer.core)

    def __enter__(self) -> DecodeGraph:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self) -> None:
        """Take memory for the coming tokens, run the step once to warm it up, and capture it."""
        self.close()
        cores = [layer.core for layer in self._cache.headwise_layers]
        for core in cores:
            begin_capture(core, self._column, self._room)
        self._cache.captured = True
        # The trial, and perhaps the capture, change what follows depends on; the rows that they write lie beyond
        # the lengths, where nobody reads.
        changed = [self._column, self._positions]
        for core in cores:
            assert core.store is not None
            changed += [*core.store.volatile(), *core.later.newest.state().values()]
        before = [tensor.clone() for tensor in changed]
        self._step()
        self._replay = self._capture(self._step)
        for tensor, content in zip(changed, before, strict=True):
            tensor.copy_(content)
        self._left = self._room

    def _step(self) -> Float[Tensor, "b v"]:
        logits = self._model(
            input_ids=self._ids, position_ids=self._positions, past_key_values=self._cache, use_cache=True
        ).logits
        self._column.add_(1)
        self._positions.add_(1)
        result: Tensor = logits[:, -1]
        return result
