"""Doctor: nothing -> what headwise finds on this machine: versions, devices, kernels and the default model."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.text import Text

from headwise.cli import options
from headwise.cli.loading import device_names
from headwise.cli.tables import facts_table, output

_EXTRAS = {
    "cli": ("typer", "rich"),
    "plot": ("matplotlib",),
    "default-model": ("gguf", "accelerate"),
}


def doctor(json_output: options.Json = False) -> None:
    """Show what headwise finds on this machine; fetches nothing."""
    found = _examine()
    if json_output:
        output().out(json.dumps(found, indent=2))
    else:
        _show(found)


def _examine() -> dict[str, Any]:
    import torch

    from headwise.measure.machine import describe_versions

    return {
        "versions": describe_versions(),
        "extras": {extra: {name: _version(name) for name in names} for extra, names in _EXTRAS.items()},
        "devices": [{"name": name, "description": _device(name)} for name in device_names()],
        "threads": torch.get_num_threads(),
        "kernels": {name: _kernels(name) for name in device_names()},
        "default_model": _default_model(),
    }


def _kernels(device: str) -> dict[str, Any]:
    """Which kernels would run on that device, and why the others would not."""
    import torch

    from headwise.kernels.backends import AUTO, NAMES, choose, instructions, obstacle

    where = torch.device(device)
    obstacles = {name: obstacle(name, where) for name in NAMES}
    return {"default": choose(AUTO, where).name, "instructions": instructions(where), "obstacles": obstacles}


def _default_model() -> dict[str, Any]:
    """Where the default model would come from, and whether it is there already."""
    from huggingface_hub import try_to_load_from_cache

    from headwise.hosts.transformers.models import DEFAULT_MODEL, default_model_folder, is_model_folder

    chosen, folder = os.environ.get("HEADWISE_MODEL"), default_model_folder()
    if chosen and Path(chosen).exists():
        return {"name": chosen, "chosen_by": "HEADWISE_MODEL", "present": is_model_folder(Path(chosen))}
    if not chosen and is_model_folder(folder):
        return {"name": str(folder), "chosen_by": None, "present": True}
    name = chosen or DEFAULT_MODEL
    try:
        fetched = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:
        # A name that the Hub could not have.
        fetched = False
    return {"name": name, "chosen_by": "HEADWISE_MODEL" if chosen else None, "present": fetched}


def _device(name: str) -> str:
    import torch

    if name == "cpu":
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    if name.startswith("cuda"):
        properties = torch.cuda.get_device_properties(name)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _show(found: dict[str, Any]) -> None:
    table = facts_table()
    for name, version in found["versions"].items():
        table.add_row(name, version)
    for extra, packages in found["extras"].items():
        table.add_row(f"extra {extra}", _extra(extra, packages))
    for device in found["devices"]:
        table.add_row(f"device {device['name']}", device["description"])
    table.add_row("threads", str(found["threads"]))
    for device, kernels in found["kernels"].items():
        having = f", with {kernels['instructions']}" if kernels["instructions"] else ""
        table.add_row(f"kernels on {device}", f"{kernels['default']} would run{having}")
        for name, reason in kernels["obstacles"].items():
            table.add_row("", f"{name}: {reason or 'can run'}")
    model = found["default_model"]
    by = f" (chosen by {model['chosen_by']})" if model["chosen_by"] else ""
    table.add_row("default model", f"{model['name']}{by}")
    missing = "no such folder, and not fetched from the Hub" if model["chosen_by"] else "not yet; fetched at first use"
    table.add_row("", Text("there", style="green") if model["present"] else Text(missing, style="yellow"))
    output().print(table)


def _extra(extra: str, packages: dict[str, str | None]) -> Text:
    missing = [name for name, version in packages.items() if version is None]
    if missing:
        return Text(f"{', '.join(missing)} missing: pip install 'headwise[{extra}]'", style="yellow")
    return Text(", ".join(f"{name} {version}" for name, version in packages.items()))
