"""Capture: a prompt, read and repeated by the model -> what every layer has at hand, and the scores to predict."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from headwise.files import whole_file
from headwise.gate.inputs import gate_inputs
from headwise.hosts.transformers.cache import HeadwiseCache
from headwise.hosts.transformers.decoder import decoder_of
from headwise.policies.evidence import Evidence
from headwise.policies.scored import RepetitionScored
from headwise.policies.size import Size
from headwise.types import Float, Int, Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ScoredPrompt:
    """One layer, one prompt of t tokens.

    Attributes:
        inputs: what a gate sees of every token.
        score: the largest attention it got from a query of the group while the model repeated the prompt.
    """

    inputs: Float[Tensor, "t c"]
    score: Float[Tensor, "t h"]


@dataclass(frozen=True)
class ScoreRecorder(RepetitionScored):
    """Keeps everything, and writes down what it was shown. Not registered: training uses it."""

    keep: Size = 1.0
    seen: list[ScoredPrompt] = field(default_factory=list, compare=False)

    def score(self, evidence: Evidence) -> Float[Tensor, "b h t"]:
        """As it was found."""
        found = evidence.repetition_peaks
        assert found is not None
        inputs = gate_inputs(evidence.keys, evidence.position[:, 0], evidence.length, evidence.rotation)
        self.seen.append(ScoredPrompt(inputs[0], found[0].T))
        return found


@torch.inference_mode()
def record_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Int[Tensor, "1 t"]
) -> dict[int, ScoredPrompt]:
    """What there is to learn from a prompt, by layer."""
    policy = ScoreRecorder()
    cache = HeadwiseCache(model, policy, tokenizer=tokenizer)
    decoder_of(model)(input_ids=ids, past_key_values=cache, use_cache=True)
    return {layer.core.index: seen for layer, seen in zip(cache.headwise_layers, policy.seen, strict=True)}


def write_scores(layers: dict[int, ScoredPrompt], path: Path) -> None:
    """As a file that is there as a whole or not at all; inputs in half precision."""
    tensors = {f"inputs.{index}": layer.inputs.half() for index, layer in layers.items()}
    tensors |= {f"score.{index}": layer.score for index, layer in layers.items()}
    with whole_file(path) as scratch:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, scratch)


def read_scores(path: Path, layer: int, device: torch.device) -> ScoredPrompt:
    """One layer of what `write_scores` wrote."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        return ScoredPrompt(file.get_tensor(f"inputs.{layer}").float(), file.get_tensor(f"score.{layer}"))


def layers_in(path: Path) -> list[int]:
    """Those that `write_scores` wrote."""
    with safe_open(path, framework="pt") as file:
        return sorted(int(name.partition(".")[2]) for name in file.keys() if name.startswith("score."))  # noqa: SIM118
