"""Run: a model and texts -> trained gates; every passage and every layer that is finished is kept.

Two parts: the model reads and repeats each passage once, then each layer is trained on what all of them gave.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headwise.gate.gate import Gates, LayerGate
from headwise.measure.texts import Document
from headwise.training.corpus import Corpus
from headwise.training.gate.capture import ScoredPrompt, layers_in, read_scores, record_scores, write_scores
from headwise.training.gate.one_layer import TrainingOptions, train
from headwise.training.passages import draw_passages
from headwise.training.run import Tell, begin_run, layer_file, load_layer, model_name, save_layer
from headwise.version import __version__
from headwise.weights import sample_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CORRELATION = "correlation"


@dataclass(frozen=True)
class Recipe:
    """What is captured, and how it is learnt.

    Attributes:
        sequences: passages of the texts; a tenth of them checks what was learnt.
        shortest, longest: their tokens.
        training: of every layer.
    """

    sequences: int = 48
    shortest: int = 512
    longest: int = 2048
    training: TrainingOptions = field(default_factory=TrainingOptions)


class GateRun:
    """Trains the gates of a model.

    Args:
        work: folder for what is captured and for finished layers.
        resume: whether to go on with what is in that folder.

    Raises:
        ConfigurationError: when the folder holds another run.
        InputError: when the texts are too short.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[Document],
        recipe: Recipe,
        work: Path,
        *,
        resume: bool = False,
    ) -> None:
        self._model, self._tokenizer, self._recipe, self._work = model, tokenizer, recipe, work
        self._corpus = Corpus(tokenizer, texts)
        seed = recipe.training.seed
        self._passages = draw_passages(
            self._corpus.lengths, recipe.sequences, (recipe.shortest, recipe.longest), 0, seed
        )
        self.about: dict[str, Any] = {
            "model": model_name(model),
            "texts": self._corpus.about,
            **asdict(recipe),
            "headwise": __version__,
        }
        begin_run(work, self.about, resume=resume)

    def run(self, tell: Tell) -> Gates:
        """Capture, train, and put the layers together."""
        files = self._capture(tell)
        layers: dict[int, LayerGate] = {}
        correlations: dict[str, float] = {}
        indices = layers_in(files[0])
        for done, index in enumerate(indices):
            tell("train", done, len(indices))
            path = layer_file(self._work, index)
            if not path.is_file():
                self._train_layer(index, files, path)
            tensors, figures = load_layer(path, (_CORRELATION,))
            correlations[str(index)] = figures[_CORRELATION]
            layers[index] = LayerGate(**tensors)
        tell("train", len(indices), len(indices))
        return Gates(layers, {**self.about, "layers": correlations}, sample_weights(self._model))

    def finish(self) -> None:
        """Remove the folder for what is captured."""
        shutil.rmtree(self._work)

    def _capture(self, tell: Tell) -> list[Path]:
        files = [self._work / f"passage-{number:05d}.safetensors" for number in range(len(self._passages))]
        for number, (passage, file) in enumerate(zip(self._passages, files, strict=True)):
            tell("capture", number, len(files))
            if not file.is_file():
                ids = self._corpus.ids(passage.text, passage.start, passage.prompt)
                write_scores(
                    record_scores(self._model, self._tokenizer, torch.tensor([ids], device=self._model.device)), file
                )
        tell("capture", len(files), len(files))
        return files

    def _train_layer(self, index: int, files: Sequence[Path], path: Path) -> None:
        options = self._recipe.training
        torch.manual_seed(options.seed + index)
        parts: dict[bool, list[ScoredPrompt]] = {True: [], False: []}
        for passage, file in zip(self._passages, files, strict=True):
            parts[passage.checks].append(read_scores(file, index, self._model.device))
        result = train(parts[False], parts[True], options)
        save_layer(path, result.gate.tensors(), {_CORRELATION: result.correlation})
