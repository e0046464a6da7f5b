"""lm-evaluation-harness: its requests -> answers of a model with a compressed cache; registered there as `headwise`.

    headwise lm-eval --model headwise --model_args pretrained=FOLDER,policy=fastgen,recovery=0.95 --tasks arc_easy

Likelihoods are computed as `likelihood` describes; texts are generated with a new cache for every batch.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from headwise.errors import ConfigurationError, InputError, UnsupportedModelError
from headwise.eval.likelihood import Stretch, cut, score
from headwise.eval.task import Subject
from headwise.hosts.transformers.cache import HeadwiseCache
from headwise.hosts.transformers.models import default_device, find_default_model
from headwise.kernels.backends import AUTO
from headwise.policies.words import describe_policy, parse_policy
from headwise.report.report import Report
from headwise.types import Tensor

# Options of the harness's own model that could have no effect here.
_WITHOUT_EFFECT = {"self", "kwargs", "backend", "logits_cache", "softmax_dtype", "mixed_precision_dtype"}
_OF_MODEL = inspect.signature(HFLM.__init__).parameters.keys() - _WITHOUT_EFFECT


@register_model("headwise")
class HeadwiseLM(HFLM):
    """A causal language model of transformers whose cache is compressed.

    Likelihood tasks take one context at a time, whatever the batch size, and generate in batches.

    Args:
        pretrained: a folder or Hub id; the default model where it is not given.
        policy: name of a policy, or a whole spec such as `h2o:heavy=0.25,recent=0.25`.
        kernel, evict_every: as for `HeadwiseCache`.
        rolling_prompt: of text without a context, which perplexity is computed on, read so many tokens (int) or that
            share of every window (float) before compressing. They are scored too, as the pass that reads them
            predicts them: the same for every policy.
        device: default the GPU where there is one.
        batch_size: prompts that are generated for at a time; "auto" is refused.
        options: parameters of the policy, and what the harness's own model `hf` takes, such as `dtype`.

    Raises:
        ConfigurationError: for an option that neither the policy nor the model has, or a value out of range.
        UnsupportedModelError: for a model that is no causal language model.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        policy: str = "fastgen",
        kernel: str = AUTO,
        evict_every: int = 16,
        rolling_prompt: int | float = 0.5,
        device: str | None = None,
        batch_size: int | str | None = 1,
        **options: Any,
    ) -> None:
        if not str(batch_size).isdecimal():
            raise ConfigurationError(f"batch_size must be a count, got {batch_size!r}: it is not found automatically")
        if rolling_prompt < 0 or (isinstance(rolling_prompt, float) and rolling_prompt > 1):
            raise ConfigurationError(
                f"rolling_prompt must be a count of tokens (int) or a share from 0.0 to 1.0, got {rolling_prompt}"
            )
        self.policy = parse_policy(_spec(policy, {n: v for n, v in options.items() if n not in _OF_MODEL}))
        self.rolling_prompt = rolling_prompt
        super().__init__(
            pretrained=pretrained or str(find_default_model()),
            device=device or str(default_device()),
            batch_size=batch_size,
            **{name: value for name, value in options.items() if name in _OF_MODEL},
        )
        if self.backend != "causal":
            raise UnsupportedModelError(f"{type(self.model).__name__} is no causal language model")
        self.subject = Subject(self.model, self.tokenizer, {"kernel": kernel, "evict_every": evict_every})
        self._used: dict[str, float] = defaultdict(int)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Called by the harness for every kind of likelihood request."""
        stretches = [self._cut(*request) for request in requests]
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring") as progress:
            for place, found in score(self.subject, self.policy, stretches, self._note):
                answers[place] = found.log_likelihood, found.greedy
                text = requests[place][0]
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, answers[place])
                progress.update()
        return [answers[place] for place in range(len(requests))]

    def _cut(self, text: Any, context: list[int], continuation: list[int]) -> Stretch:
        if len(continuation) > self.max_length:
            raise InputError(
                f"a continuation of {len(continuation):,} tokens does not fit into the model's {self.max_length:,}; "
                "raise max_length where the model allows it"
            )
        # What is too long loses its beginning, as with every model of the harness.
        context = context[-(self.max_length + 1 - len(continuation)) :]
        # Windows of a text without context come without its text.
        return cut(context, continuation, self.rolling_prompt if text is None else 0)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Called by the harness for a batch of prompts, padded on the left."""
        cache = HeadwiseCache(self.model, self.policy, tokenizer=self.tokenizer, **self.subject.options)
        written: Tensor = super()._model_generate(context, max_length, stop, past_key_values=cache, **options)
        self._note(cache.report())
        return written

    def _note(self, report: Report) -> None:
        sizes = {"kept_ratio": report.kept_ratio, "used_bytes": report.used_bytes, "full_bytes": report.full_bytes}
        seconds = report.profile_seconds + report.compact_seconds
        for name, value in {"caches": 1, **sizes, "compress_seconds": seconds}.items():
            self._used[name] += value

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: the policy, and what all caches together kept and took.

        Sizes are those at the end of a prompt, or of a generated text.
        """
        used = dict(self._used)
        if used:
            used["kept_ratio"] /= used["caches"]
        options = {**self.subject.options, "rolling_prompt": self.rolling_prompt}
        told: dict[str, Any] = super().get_model_info()
        return {**told, "headwise": {**describe_policy(self.policy), **options, **used}}


def _spec(policy: str, parameters: dict[str, Any]) -> str:
    """The policy and parameters that the harness has already read, as one spec."""
    words = [f"{name}={','.join(map(str, v)) if isinstance(v, list) else v}" for name, v in parameters.items()]
    return policy + ("," if ":" in policy else ":") + ",".join(words) if words else policy
