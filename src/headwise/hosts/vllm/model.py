"""Model: what vLLM runs -> what policies ask of it beside queries and rows: kinds of tokens, and gates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from headwise.errors import ConfigurationError, HeadwiseError
from headwise.gate.checkpoint import check_gates, load_gates, shipped_gates
from headwise.gate.gate import Gates, LayerGate
from headwise.hosts.vllm.options import GATES, Options
from headwise.types import Tensor, UInt8
from headwise.weights import sampled


class Model:
    """A model, by the configuration of its engine."""

    def __init__(self, config: Any) -> None:
        self._config = config.model_config

    def kinds(self, options: Options, ids: Sequence[int]) -> UInt8[Tensor, "1 t"] | None:
        """Of the tokens of a prompt; None where the policy does not look at them."""
        if not options.keeping(1).reads_kinds:
            return None
        found = torch.tensor(ids, device="cpu")
        # What is beyond the vocabulary is an ordinary token.
        return torch.nn.functional.pad(self._kinds, (0, 1))[found.clamp(0, len(self._kinds))][None]

    def kinds_obstacle(self) -> str | None:
        """Why its tokenizer does not tell them; None where it does."""
        if self._config.skip_tokenizer_init:
            return "it has no tokenizer"
        if self._config.is_multimodal_model:
            return "its model sees or hears, and what stands for that counts as special"
        try:
            return None if len(self._kinds) else "its vocabulary is empty"
        except Exception as error:  # Tokenizers of vLLM's own do not all speak as those of transformers.
            return f"its tokenizer fails ({type(error).__name__}: {error})"

    @cached_property
    def _kinds(self) -> UInt8[Tensor, " vocabulary"]:
        from vllm.tokenizers import cached_tokenizer_from_config

        from headwise.hosts.vocabulary import kinds_of_vocabulary

        return kinds_of_vocabulary(cached_tokenizer_from_config(self._config))


def layer_gate(options: Options, layer_name: str) -> LayerGate | None:
    """Of a layer; None where the policy asks for none."""
    if options.keeping(1).gates is False:
        return None
    from vllm.model_executor.models.utils import extract_layer_index

    return _gates().layers[extract_layer_index(layer_name)]


def gates_obstacle(config: Any) -> str | None:
    """Why gates cannot be asked for in that engine; None where they can."""
    if config.parallel_config.tensor_parallel_size > 1:
        return "a gate looks at all heads of a layer, and each process has some of them (tensor parallel)"
    try:
        check_gates(_gates(), _sampled_files(config.model_config))
    except (HeadwiseError, OSError, ValueError) as error:
        return str(error)
    return None


@lru_cache(maxsize=1)
def _gates() -> Gates:
    folder = os.environ.get(GATES)
    return load_gates(Path(folder) if folder else shipped_gates())


def _sampled_files(model: Any) -> dict[str, Tensor]:
    """A few numbers of every parameter, as the files have them that the model was loaded from.

    Raises:
        ConfigurationError: when there are none of that kind.
    """
    folder = Path(model.model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))
    samples = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                samples[name] = sampled(file.get_tensor(name)).float().clone()
    if not samples:
        raise ConfigurationError(f"gates know a model by its weights, and {model.model!r} has none in safetensors")
    return samples
