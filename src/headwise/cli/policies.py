"""Policies: nothing -> every policy there is, what it does and what it can be told."""

from __future__ import annotations

import inspect
import json
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any

from rich.text import Text

from headwise.cli import options
from headwise.cli.tables import output, plain_table

if TYPE_CHECKING:
    from headwise.policies import Policy


# Of these a policy takes one.
_TARGETS = ("recovery", "keep", "ratio", "bytes")


def policies(json_output: options.Json = False) -> None:
    """List every policy with its parameters."""
    from headwise.policies import list_policies

    listed = [_describe(name, policy) for name, policy in list_policies().items()]
    if json_output:
        output().out(json.dumps(listed, indent=2))
        return
    table = plain_table("policy", "what it does", "parameters")
    table.columns[0].no_wrap = True
    for entry in listed:
        parameters = Text("\n").join(_parameter(**parameter) for parameter in entry["parameters"])
        table.add_row(Text(entry["name"], style="bold"), entry["summary"], parameters)
        table.add_section()
    console = output()
    console.print(table)
    console.print("Use one with --policy NAME, and set its parameters with --set NAME=VALUE.", style="dim")


def _describe(name: str, policy: type[Policy]) -> dict[str, Any]:
    from headwise.policies.base import parameter_fields
    from headwise.policies.words import DEFAULT_RECOVERY, plain

    parameters = []
    for field in parameter_fields(policy):
        if not field.init:
            continue
        required = field.default is MISSING
        default = None if required else plain(field.default)
        # The command line has an answer where the library asks.
        if field.name == "recovery" and default is None:
            default, required = DEFAULT_RECOVERY, False
        parameters.append({"name": field.name, "default": default, "required": required})
    return {
        "name": name,
        "summary": (inspect.getdoc(policy) or "").partition("\n")[0],
        "parameters": parameters,
    }


def _parameter(name: str, default: Any, required: bool) -> Text:
    if required:
        return Text.assemble(name, (" (required)", "yellow"))
    if default is None and name in _TARGETS:
        return Text.assemble(name, (" (instead of another)", "dim"))
    # As --set takes it.
    shown = ",".join(default) if isinstance(default, list) else str(default)
    return Text.assemble(name, (f"={shown.lower() if default is None or isinstance(default, bool) else shown}", "dim"))
