"""kvpress kept: a prompt and presses, as JSON on standard input -> what each keeps of it, as safetensors files.

Run by an interpreter that has torch, transformers and kvpress; nothing of headwise is imported here. The request:

    {"model", "threads", "ids", "following", "last", "folder", "runs": [{"name", "presses", "share"}, ...]}

`presses` are class names, the outermost first. Each run leaves `name`.safetensors in the folder, with two tensors over
layers, heads and columns: `kept`, and the `scores` that it was decided by. Where there are `following` tokens, they are
fed behind the prompt, and `predictions` has the log-probabilities after each, or after the `last` of them. A run with
`target` and `interval` in place of `share` keeps the prompt, and prunes to so many rows whenever so many tokens have
come; it leaves `predictions`, and the `rows` of a head at the end. The answer on standard output: versions.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from importlib import import_module, metadata
from pathlib import Path
from typing import Any


class Watch:
    """Takes down what a press scores and keeps, layer by layer, while it works as ever."""

    def __init__(self, press: Any) -> None:
        self.press = press
        self.scores: dict[int, Any] = {}
        self._kept_columns: dict[int, Any] = {}
        scorer = getattr(press, "press", press)
        if hasattr(scorer, "score"):
            self._score, scorer.score = scorer.score, self._note_scores
            self._compress, press.compress = press.compress, self._note_columns
        else:
            self._finish, press.compress_post = press.compress_post, self._note_all_scores

    def kept(self, module: Any) -> Any:
        """Which columns stay in each head of that attention module."""
        import torch

        scores = self.scores[module.layer_idx]
        masked = getattr(module, "masked_key_indices", None)
        if masked is None:
            kept = torch.zeros_like(scores, dtype=torch.bool)
            return kept.scatter(2, self._kept_columns[module.layer_idx], True)
        kept = torch.ones_like(scores, dtype=torch.bool)
        kept[masked] = False
        return kept

    def _note_columns(self, module: Any, hidden: Any, keys: Any, values: Any, *rest: Any) -> Any:
        import torch

        # Pruned like values, the numbers of the columns say which ones stay. The scores still see the values.
        self._values = values
        columns = torch.arange(keys.shape[2], device=keys.device)[None, None, :, None].expand(values.shape)
        kept_keys, kept_columns = self._compress(module, hidden, keys, columns, *rest)
        self._kept_columns[module.layer_idx] = kept_columns[..., 0]
        return kept_keys, values.gather(2, kept_columns)

    def _note_scores(self, module: Any, hidden: Any, keys: Any, _: Any, *rest: Any) -> Any:
        # Not copied: a press around this one marks in place what it keeps in any case.
        scores = self.scores[module.layer_idx] = self._score(module, hidden, keys, self._values, *rest)
        return scores

    def _note_all_scores(self, model: Any) -> None:
        self._finish(model)
        self.scores = dict(enumerate(self.press.score_val))


def make_press(names: list[str], share: float) -> Any:
    """The innermost press with that share to keep, and the others around it."""
    kvpress = import_module("kvpress")
    press = getattr(kvpress, names[-1])(compression_ratio=1 - share)
    for name in reversed(names[:-1]):
        press = getattr(kvpress, name)(press)
    return press


def run(model: Any, ids: Any, press: Any, following: Any = None) -> dict[str, Any]:
    """Read the prompt under the press; `[layers, heads, columns]` of what it kept, and of its scores.

    With tokens that follow also what is predicted after each of them.
    """
    import torch
    from transformers import DynamicCache

    watch, cache = Watch(press), DynamicCache()
    with torch.inference_mode(), press(model):
        if hasattr(press, "prefix_length"):
            # So many tokens would be taken for what a chat template puts before the text, and not be repeated.
            press.prefix_length = 0
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    modules = [layer.self_attn for layer in model.model.layers]
    kept = torch.cat([watch.kept(module) for module in modules])
    found = {"kept": kept, "scores": torch.cat([watch.scores[module.layer_idx] for module in modules]).float()}
    return found if following is None else {**found, "predictions": feed(model, cache, following, ids.shape[1])}


def run_decoding(model: Any, ids: Any, wanted: dict[str, Any], following: Any, last: int) -> dict[str, Any]:
    """Read the prompt, and feed the rest under a press that works while tokens come."""
    import torch
    from transformers import DynamicCache

    inner = make_press(wanted["presses"], 1.0)
    press = import_module("kvpress").DecodingPress(
        inner, compression_interval=wanted["interval"], target_size=wanted["target"]
    )
    cache = DynamicCache()
    with torch.inference_mode(), press(model):
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        predictions = feed(model, cache, following, ids.shape[1], last)
    rows = torch.tensor([layer.keys.shape[2] for layer in cache.layers])
    return {"predictions": predictions, "rows": rows}


def feed(model: Any, cache: Any, ids: Any, start: int, last: int | None = None) -> Any:
    """Log-probabilities after each of the tokens, one at a time: layers that hold different numbers need that.

    With `last` only those after so many of the last.
    """
    import torch

    rows: deque[Any] = deque(maxlen=last)
    with torch.inference_mode():
        for number, token in enumerate(ids.split(1, dim=1)):
            # The cache is shorter than the text, so that positions taken from its length would be wrong.
            position = torch.tensor([[start + number]])
            rows.append(model(input_ids=token, past_key_values=cache, position_ids=position).logits[0])
    return torch.cat(list(rows)).float().log_softmax(dim=-1)


def main() -> None:
    """Do what is asked for on standard input."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Libraries write to standard output what they like; the answer has a channel of its own.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    ask = json.load(sys.stdin)
    torch.set_num_threads(ask["threads"])
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(ask["model"], **options).eval()
    ids, following = torch.tensor(ask["ids"]), torch.tensor(ask["following"]) if "following" in ask else None
    for wanted in ask["runs"]:
        sys.stderr.write(f"kvpress: {wanted['name']}\n")
        if "target" in wanted:
            found = run_decoding(model, ids, wanted, following, ask["last"])
        else:
            found = run(model, ids, make_press(wanted["presses"], wanted["share"]), following)
        save_file(found, Path(ask["folder"]) / f"{wanted['name']}.safetensors")
    channel.write(json.dumps({name: metadata.version(name) for name in ("kvpress", "transformers", "torch")}))


if __name__ == "__main__":
    main()
