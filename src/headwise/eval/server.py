"""Server: a vLLM server with headwise in it, token ids and options -> what it wrote, and what it thought of each token.

Only what is written behind a prompt sees what was chosen of it, so that text to be scored is not given as a part of the
prompt: the server is told to write it (`headwise.hosts.vllm.forced`).
"""

from __future__ import annotations

import http.client
import json
import math
import re
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from headwise.errors import ConfigurationError
from headwise.hosts.vllm.options import FORCED, KEY, OFF, POLICY, RATIO, Options
from headwise.types import Float, Tensor

# Likeliest tokens that are asked for; what is left of the probability is spread evenly over the others.
_TOP = 4000

_TIMEOUT_SECONDS = 900

# By which tokenizers are told apart.
_SAMPLE = "The quick brown fox, aged 37½, jumps over 12,345 lazy dogs – naïvely; def f(x): return x**2  # 漢字"
_START = (
    f"start it with --logits-processors headwise.hosts.vllm.forced:Forced --max-logprobs {_TOP}, as docs/vllm.md says"
)


@dataclass(frozen=True)
class Served:
    """What came of a request.

    Attributes:
        ids: that were written.
        rows: log-probabilities, at the place of each of them; None where they were not asked for.
        seconds: until the first of them was there.
        choosing: of these, what was spent on choosing and moving rows, if nobody else asked at that time.
    """

    ids: list[int]
    rows: Float[Tensor, "n vocabulary"] | None
    seconds: float
    choosing: float


@dataclass(frozen=True)
class ServedPrompt:
    """How a prompt is compressed, and what is left of it.

    Attributes:
        options: None for all of it.
        kept_ratio: rows that stay, of those that there were.
        used_bytes, full_bytes: of the rows that stay, and of all.
    """

    options: Options | None
    kept_ratio: float
    used_bytes: int
    full_bytes: int


class Server:
    """A vLLM server that speaks OpenAI's protocol.

    Args:
        url: such as "http://localhost:8000"; `/v1` behind it may be left out.
        tokenizer: of its model.
        vocabulary: of its model, in logits.
        ends: tokens that end a text.

    Attributes:
        block_size: tokens in a block of its cache.
        release: of vLLM.
        model: as the server calls it, and where it has it from.

    Raises:
        ConfigurationError: when it does not answer, headwise is not in it, or its tokenizer is another.
    """

    def __init__(self, url: str, tokenizer: PreTrainedTokenizerBase, vocabulary: int, ends: Set[int]) -> None:
        self.tokenizer = tokenizer
        self._ends = ends
        self._root, self._vocabulary = url.rstrip("/").removesuffix("/v1"), vocabulary
        told = self._json("/v1/models")["data"][0]
        self.model = {"id": str(told["id"]), "root": str(told.get("root", ""))}
        self.release = str(self._json("/version")["version"])
        size = re.search(r'vllm:cache_config_info\{[^}]*\bblock_size="(\d+)"', self._get("/metrics"))
        if size is None:
            raise ConfigurationError(f"{self._root} does not say how large its blocks are: is it vLLM?")
        self.block_size = int(size[1])
        self._check_tokenizer()
        self._check_headwise()

    def write(
        self, prompt: Sequence[int], limit: int, options: Options | None, forced: Sequence[int] = (), rows: bool = False
    ) -> Served:
        """Go on greedily behind a prompt, to the end of the text or of what it must write.

        Args:
            limit: tokens to be written at the most, the forced ones included.
            options: None for the full cache.
            forced: what it must write first.
            rows: whether log-probabilities are wanted.

        Raises:
            ConfigurationError: when the server refuses; saying what it said.
        """
        xargs: dict[str, Any] = {KEY: OFF} if options is None else {POLICY: options.policy, RATIO: options.ratio}
        asked = {
            "prompt": list(prompt),
            "max_tokens": limit,
            "vllm_xargs": xargs | ({FORCED: list(forced)} if forced else {}),
            # A chat's turns end within what it must write; the end of its own is looked for here.
            "ignore_eos": True,
            "logprobs": min(_TOP, self._vocabulary) if rows else 1,
        }
        before, started, first = self._choosing_seconds(), time.perf_counter(), math.nan
        ids: list[int] = []
        found: list[Tensor] = []
        for choice in self._parts(asked):
            first = time.perf_counter() - started if math.isnan(first) else first
            said = choice.get("logprobs") or {"tokens": [], "top_logprobs": []}
            ids += [_id(token) for token in said["tokens"]]
            found += [self._row(top) for top in said["top_logprobs"]] if rows else []
        if ids[: len(forced)] != list(forced[: len(ids)]):
            raise ConfigurationError(f"{self._root} does not write what it is told to: {_START}")
        if len(ids) != limit:
            raise ConfigurationError(f"{self._root} broke off after {len(ids)} of {limit} tokens")
        stop = next((at + 1 for at in range(len(forced), len(ids)) if ids[at] in self._ends), len(ids))
        told = torch.stack(found[:stop]) if found else None
        return Served(ids[:stop], told, first, self._choosing_seconds() - before)

    def _parts(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            yield from self._stream(asked)
        except (OSError, http.client.HTTPException) as error:
            raise ConfigurationError(f"{self._root} broke off: {error}") from error

    def _row(self, top: dict[str, float]) -> Float[Tensor, " vocabulary"]:
        ids = torch.tensor([_id(token) for token in top])
        known = torch.tensor(list(top.values()), dtype=torch.float32)
        others = max(self._vocabulary - len(known), 1)
        left = max(1.0 - float(known.double().exp().sum()), torch.finfo(torch.float32).tiny)
        return torch.full((self._vocabulary,), math.log(left / others)).scatter(0, ids, known)

    def _check_tokenizer(self) -> None:
        """Ids mean something else to another model, and the answer would look like one."""
        asked = {"model": self.model["id"], "prompt": _SAMPLE, "add_special_tokens": False}
        with self._open("/tokenize", json.dumps(asked).encode()) as answer:
            theirs = json.loads(answer.read())["tokens"]
        ours = self.tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
        if list(theirs) != list(ours):
            raise ConfigurationError(
                f"{self._root} has {self.model['root'] or self.model['id']!r}, whose tokens are not those of the model "
                "given here; say with --model which it is"
            )

    def _check_headwise(self) -> None:
        """What nobody can mean is refused where headwise is."""
        wrong = {"prompt": [0], "max_tokens": 1, "vllm_xargs": {RATIO: -1}}
        try:
            list(self._stream(wrong))
        except ConfigurationError as error:
            if KEY in str(error):
                return
            raise
        raise ConfigurationError(f"headwise is not active in {self._root}: install it into the server's environment")

    def _choosing_seconds(self) -> float:
        lines = re.findall(r"^headwise:choosing_seconds_total(?:\{[^}]*\})? (\S+)$", self._get("/metrics"), re.M)
        return sum(map(float, lines))

    def _stream(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What comes of a completion, part by part."""
        always = {"model": self.model["id"], "temperature": 0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}
        # A prompt that was read before would cost nothing.
        fresh = {"cache_salt": uuid.uuid4().hex}
        body = {"stream": True, "return_tokens_as_token_ids": True, **fresh, **always, **asked}
        with self._open("/v1/completions", json.dumps(body).encode()) as answer:
            for line in answer:
                text = line.decode().removeprefix("data:").strip()
                if not text or text == "[DONE]":
                    continue
                said = json.loads(text)
                if "error" in said:
                    raise ConfigurationError(f"{self._root} failed: {said['error'].get('message', said['error'])}")
                yield from said["choices"]

    def _json(self, path: str) -> Any:
        return json.loads(self._get(path))

    def _get(self, path: str) -> str:
        with self._open(path) as answer:
            return answer.read().decode()

    def _open(self, path: str, body: bytes | None = None) -> http.client.HTTPResponse:
        try:
            asked = urllib.request.Request(self._root + path, body, {"Content-Type": "application/json"})
            answer: http.client.HTTPResponse = urllib.request.urlopen(asked, timeout=_TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            raise ConfigurationError(f"{self._root} refused: {_message(error)}") from error
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"no server answers at {self._root}{path}: {error}") from error
        return answer


def _id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        said = json.loads(text)
        return str(said.get("error", said).get("message", text))
    except (ValueError, AttributeError):
        return text.strip() or str(error)
