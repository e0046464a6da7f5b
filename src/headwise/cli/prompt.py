"""Prompt: `--prompt` and `--file` -> the text, and its token ids for a model that has room for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from headwise.errors import InputError
from headwise.files import decode_text, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from headwise.types import Tensor

_STANDARD_INPUT = "-"


def read_prompt(prompt: str | None, file: str | None) -> str:
    """The text to give to the model: the file's, a blank line, and the prompt.

    Raises:
        InputError: when there is neither, or one of them is empty or cannot be read.
    """
    if prompt is None and file is None:
        raise InputError("no prompt: give --prompt TEXT, --file PATH, or --file - for standard input")
    if prompt is not None and not prompt.strip():
        raise InputError("the prompt is empty")
    if prompt is not None and not _is_text(prompt):
        raise InputError("the prompt is not UTF-8 text")
    parts = [] if file is None else [_read_file(file)]
    return "\n\n".join(parts + ([] if prompt is None else [prompt]))


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, raw: bool) -> Tensor:
    """The token ids of a prompt, `[1, tokens]`, in the model's chat template unless raw.

    Raises:
        InputError: when the text has no tokens, or the chat template refuses it.
    """
    from jinja2 import TemplateError

    if not raw and tokenizer.chat_template is None:
        typer.echo("note: this tokenizer has no chat template; the prompt is given as it is (--raw)", err=True)
        raw = True
    if raw:
        encoded: Any = tokenizer(text, return_tensors="pt")
    else:
        try:
            encoded = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses the prompt ({error}); try --raw") from error
    ids: Tensor = encoded["input_ids"]
    if ids.shape[-1] == 0:
        raise InputError("the prompt is empty: it has no tokens")
    return ids.long()


def check_fit(model: PreTrainedModel, prompt_tokens: int, new_tokens: int = 0) -> None:
    """Refuse a prompt, or a number of new tokens, that the model has no positions for.

    Raises:
        InputError: with the number that fits.
    """
    from headwise.measure.model_info import positions

    room = positions(model)
    if room is None or prompt_tokens + new_tokens <= room:
        return
    if prompt_tokens + min(new_tokens, 1) > room:
        raise InputError(f"the prompt has {prompt_tokens:,} tokens; the model has room for {room:,} in all")
    raise InputError(
        f"{new_tokens:,} new tokens do not fit: the prompt takes {prompt_tokens:,} of the model's {room:,} "
        f"positions; --max-new-tokens can be at most {room - prompt_tokens:,}"
    )


def _read_file(file: str) -> str:
    if file == _STANDARD_INPUT:
        return decode_text(_read_standard_input(), "standard input")
    return read_text(file)


def _read_standard_input() -> bytes:
    try:
        return typer.get_binary_stream("stdin").read()
    except OSError as error:
        raise InputError(f"cannot read standard input: {error.strerror or error}") from error


def _is_text(prompt: str) -> bool:
    # Bytes of an argument that are no UTF-8 arrive as lone surrogates.
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
