"""Setting: the results of a run, as JSON has them -> what it was measured on and how, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Letters of a hash that are shown.
_DIGITS = 16

# Said elsewhere: the query mode is part of a task's name.
_KNOWN = ("query",)


def describe_setting(results: Mapping[str, Any]) -> dict[str, str]:
    """What any table of the run must say: model, dtype, lengths, items, machine, versions, and the command."""
    model = results["model"]
    configuration, source = results["configuration"], results["configuration"]["source"]
    said = {
        "model": f"{model['name']}, {model['dtype']}, {model['layers']} layers, {model['heads']} heads, "
        f"{model['kv_heads']} KV heads",
        "machine": machine_words(results["machine"]),
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        **_describe_place(source),
        **({"rows": source["cache_dtype"]} if source.get("cache_dtype") else {}),
        "seed": str(configuration["seed"]),
    }
    said |= {task["label"]: _describe_task(task, results["inputs"][task["label"]]) for task in configuration["tasks"]}
    if results["command"]:
        said["command"] = results["command"]
    if results["interrupted"]:
        said["interrupted"] = "not all items are finished: rows may be of different ones"
    return said


def machine_words(machine: Mapping[str, Any]) -> str:
    """Where it was measured; of a server, what it says of itself."""
    if "server" in machine:
        return f"{machine['server']}, model {machine['id']}, blocks of {machine['block_size']} tokens"
    return f"{machine.get('gpu', machine['processor'])}, {machine['device']}, threads: {machine['threads']}"


def _describe_place(source: Mapping[str, Any]) -> dict[str, str]:
    """Who attended, where it was not a server."""
    if "server" in source:
        return {}
    return {"kernel": f"{source['kernel']}, evicting every {source['evict_every']} tokens"}


def _describe_task(task: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """How many items of which kind; what is not set is not said."""
    options = {name: value for name, value in task["options"].items() if name not in _KNOWN and value not in (None, [])}
    words = [f"{name} {_word(value)}" for name, value in options.items() if value is not False]
    return ", ".join([f"{inputs['items']} items", *words, f"inputs {inputs['sha256'][:_DIGITS]}"])


def _word(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
