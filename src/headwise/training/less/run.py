"""Run: a model, policies and texts -> trained kernels; every sequence and every layer that is finished is kept.

First one pass of the model over each sequence captures what all layers are asked, and each layer is trained alone.
Then, where that is wanted, every sequence becomes a trace of evictions, and all layers are trained jointly.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headwise.errors import ConfigurationError
from headwise.hosts.transformers.cache import HeadwiseCache
from headwise.hosts.transformers.decoder import decoder_of
from headwise.hosts.transformers.model_facts import output_projections, read_facts
from headwise.less.checkpoint import check_kernels
from headwise.less.features import LayerFeatures, LessKernels
from headwise.measure.texts import Document
from headwise.policies.base import Policy
from headwise.policies.less import Less
from headwise.stages.config import LayerConfig
from headwise.stages.layer import LayerCache
from headwise.training.corpus import Corpus
from headwise.training.less.capture import Captured, WatchedLayer
from headwise.training.less.jointly import JointOptions, JointResult, train_jointly
from headwise.training.less.one_layer import FIGURES, TrainableFeatures, TrainingOptions, train
from headwise.training.less.record_trace import record_trace
from headwise.training.less.samples import Samples, sample_bytes
from headwise.training.less.trace import trace_bytes
from headwise.training.passages import Passage, draw_passages
from headwise.training.run import Tell, begin_run, layer_file, load_layer, model_name, save_layer
from headwise.types import Int, Tensor
from headwise.version import __version__
from headwise.weights import sample_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Recipe:
    """What is captured, and how it is learnt.

    Attributes:
        sequences: passages of the texts; a tenth of them checks what was learnt.
        shortest, longest: tokens of the prompts.
        rows: tokens after each prompt, which are what the memory is asked.
        store_limit: bytes that the captured tensors may take on disk.
        training: of every layer alone.
        together: of all layers, after that.
    """

    sequences: int = 160
    shortest: int = 256
    longest: int = 2048
    rows: int = 192
    store_limit: int = 16 * 2**30
    training: TrainingOptions = field(default_factory=TrainingOptions)
    together: JointOptions = field(default_factory=JointOptions)


class TrainingRun:
    """Trains the kernels of LESS for a model.

    Args:
        policies: what evicts, as words and as policies; sequences take turns.
        work: folder for what is captured and for finished layers.
        resume: whether to go on with what is in that folder.
        start: kernels to start from; None for random ones.

    Raises:
        ConfigurationError: when the folder holds another run, the captured tensors would exceed the limit, or nothing
            is to be trained.
        MismatchError: when the kernels to start from are of another model.
        InputError: when the texts are too short.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        policies: Sequence[tuple[str, Policy]],
        texts: Sequence[Document],
        recipe: Recipe,
        work: Path,
        *,
        resume: bool = False,
        start: LessKernels | None = None,
    ) -> None:
        if start is not None:
            check_kernels(start, model)
        elif not recipe.training.epochs:
            raise ConfigurationError("kernels to start from are needed where no epoch trains each layer alone")
        self._model, self._tokenizer, self._start = model, tokenizer, start
        self._policies, self._recipe, self._work = policies, recipe, work
        self._corpus = Corpus(tokenizer, texts)
        prompts, seed = (recipe.shortest, recipe.longest), recipe.training.seed
        self._passages = draw_passages(self._corpus.lengths, recipe.sequences, prompts, recipe.rows, seed)
        self.about: dict[str, Any] = {
            "model": model_name(model),
            "policies": [spec for spec, _ in policies],
            "texts": self._corpus.about,
            **asdict(recipe),
            "start": None if start is None else {"digest": start.digest, **start.about},
            "headwise": __version__,
        }
        self._check_size()
        begin_run(work, self.about, resume=resume)

    def run(self, tell: Tell) -> LessKernels:
        """Capture, train, and put the layers together."""
        alone = self._start
        if self._recipe.training.epochs:
            layers, errors = self._train(self._capture(tell), tell)
            alone = LessKernels(layers, {**self.about, "layers": errors}, sample_weights(self._model))
        assert alone is not None
        if not self._recipe.together.epochs:
            return alone
        result = self._train_jointly(alone, tell)
        divergence = {"without": result.without, "with": result.divergences}
        about = {**self.about, "layers": alone.about["layers"], "divergence": divergence}
        return LessKernels(result.layers, about, alone.sample)

    def finish(self) -> None:
        """Remove the folder for what is captured."""
        shutil.rmtree(self._work)

    def _check_size(self) -> None:
        facts, _ = read_facts(self._model)
        recipe, shapes, needed = self._recipe, facts.compressed_shapes, 0
        config = self._model.config.get_text_config(decoder=True)
        if recipe.training.epochs:
            queries = config.num_attention_heads
            needed += sum(
                sample_bytes(*self._room(), shape.heads, queries // shape.heads, shape.key_dim, shape.value_dim)
                for shape in shapes
            )
        if recipe.together.epochs:
            needed += sum(
                trace_bytes(passage.prompt, recipe.rows, shapes, config.vocab_size) for passage in self._passages
            )
        if needed > recipe.store_limit:
            fit = recipe.sequences * recipe.store_limit // needed
            raise ConfigurationError(
                f"{recipe.sequences} sequences take up to {needed / 2**30:.1f} GiB on disk, and the limit is "
                f"{recipe.store_limit / 2**30:.1f} GiB: ask for {fit} or fewer, for shorter ones, or raise it"
            )

    def _room(self) -> tuple[int, int]:
        """Query rows and evicted tokens of a layer at most."""
        rows = self._recipe.rows
        return len(self._passages) * rows, sum(passage.prompt + rows for passage in self._passages)

    def _capture(self, tell: Tell) -> Samples:
        samples = Samples(self._work / "samples", *self._room())
        for number in range(samples.sequences, len(self._passages)):
            tell("capture", number, len(self._passages))
            _, policy = self._policies[number % len(self._policies)]
            samples.append(self._captured(self._passages[number], policy))
        tell("capture", len(self._passages), len(self._passages))
        return samples

    def _train_jointly(self, alone: LessKernels, tell: Tell) -> JointResult:
        paths = self._record_traces(alone, tell)
        parts: dict[bool, list[Path]] = {False: [], True: []}
        for path, passage in zip(paths, self._passages, strict=True):
            parts[passage.checks].append(path)
        state, options = self._work / "together.pt", self._recipe.together
        return train_jointly(
            self._model, alone.layers, parts[False], parts[True], options, state, partial(tell, "train together")
        )

    def _record_traces(self, alone: LessKernels, tell: Tell) -> list[Path]:
        folder = self._work / "traces"
        folder.mkdir(exist_ok=True)
        paths = [folder / f"{number:05d}.safetensors" for number in range(len(self._passages))]
        for number, (path, passage) in enumerate(zip(paths, self._passages, strict=True)):
            tell("traces", number, len(paths))
            if not path.is_file():
                policy = Less(self._policies[number % len(self._policies)][1], alone)
                record_trace(self._model, self._tokenizer, policy, self._ids(passage), passage.prompt).save(path)
        tell("traces", len(paths), len(paths))
        return paths

    def _captured(self, passage: Passage, policy: Policy) -> dict[int, Captured | None]:
        return capture(self._model, self._tokenizer, policy, self._ids(passage), passage.prompt)

    def _ids(self, passage: Passage) -> Int[Tensor, "1 t"]:
        tokens = self._corpus.ids(passage.text, passage.start, passage.prompt + self._recipe.rows)
        return torch.tensor([tokens], device=self._model.device)

    def _train(self, samples: Samples, tell: Tell) -> tuple[dict[int, LayerFeatures], dict[str, dict[str, float]]]:
        projections = output_projections(self._model)
        layers: dict[int, LayerFeatures] = {}
        errors: dict[str, dict[str, float]] = {}
        all_layers = samples.layers
        for done, index in enumerate(all_layers):
            tell("train", done, len(all_layers))
            path = layer_file(self._work, index)
            if not path.is_file():
                self._train_layer(index, samples, projections.get(index), path)
            tensors, errors[str(index)] = load_layer(path, FIGURES)
            layers[index] = LayerFeatures(**tensors)
        tell("train", len(all_layers), len(all_layers))
        return layers, errors

    def _train_layer(self, index: int, samples: Samples, projection: Tensor | None, path: Path) -> None:
        options, device = self._recipe.training, self._model.device
        torch.manual_seed(options.seed + index)
        there = samples.of_layer(index)
        checks = [number for number in there if self._passages[number].checks]
        learns = [number for number in there if not self._passages[number].checks]
        first = samples.batch(index, there[:1], device).query
        heads, group, dim = first.shape[1], first.shape[2], first.shape[-1]
        kernels = TrainableFeatures(heads, group, dim, options.width, options.features).to(device)
        if self._start is not None and index in self._start.layers:
            kernels.start_from(self._start.layers[index].to(device))
        weight = None if projection is None else projection.float()
        result = train(kernels, lambda n: samples.batch(index, n, device), learns, checks, weight, options)
        save_layer(path, result.kernels.tensors(), result.figures)


class _WatchedCache(HeadwiseCache):
    def make_layer(self, config: LayerConfig) -> LayerCache:
        return WatchedLayer(config, self.token_log)


def capture(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: Policy, ids: Tensor, prompt: int
) -> dict[int, Captured | None]:
    """What every compressed layer was asked after the prompt.

    Args:
        ids: `[1, t]`, of which the first `prompt` are read at once.
    """
    cache = _WatchedCache(model, policy, tokenizer=tokenizer, prompt_tokens=prompt)
    decoder = decoder_of(model)
    with torch.inference_mode():
        for part in (ids[:, :prompt], ids[:, prompt:]):
            decoder(input_ids=part, past_key_values=cache, use_cache=True)
    cores = [layer.core for layer in cache.headwise_layers]
    return {core.index: core.captured() for core in cores if isinstance(core, WatchedLayer)}
