"""Report: what came of all parts -> one record for JSON, and the same as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from on_gpu.runner import BAD, CUT_OFF, NOT_RUN, PartResult

_INDENT = "  "


def record_of(results: Sequence[PartResult], seconds: float, *, tiny: bool) -> dict[str, Any]:
    """Everything, as plain values; complete at any moment."""
    facts = _figures(results, "machine")
    return {
        "tiny": tiny,
        "seconds": round(seconds, 1),
        "commit": facts.get("commit"),
        "machine": facts.get("machine", {}),
        "versions": facts.get("versions", {}),
        "targets": targets_of(results),
        "parts": [
            {
                "name": result.name,
                "limit": result.limit,
                "seconds": result.seconds,
                "trouble": result.trouble,
                "outcomes": dict(Counter(case["outcome"] for case in result.cases)),
                "cases": result.cases,
            }
            for result in results
        ],
    }


def targets_of(results: Sequence[PartResult]) -> list[dict[str, Any]]:
    """Every target once, with the last that was said of it."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        for case in result.cases:
            for verdict in case.get("figures", {}).get("targets", []):
                found[verdict["name"]] = verdict
    return list(found.values())


def anything_bad(results: Sequence[PartResult]) -> bool:
    """Whether anything failed; targets that are missed and what there was no time for are not."""
    return any(result.trouble or any(case["outcome"] in BAD for case in result.cases) for result in results)


def text_of(record: dict[str, Any]) -> str:
    """For people: the machine, the targets, what is wrong, figures, and what was not got to."""
    lines = [f"headwise on a GPU{', everything tiny' if record['tiny'] else ''}: {record['seconds']:.0f} s"]
    lines += _facts(record)
    lines += ["", "Targets"]
    lines += [_target(verdict) for verdict in record["targets"]] or [f"{_INDENT}none was judged: nothing could begin"]
    for part in record["parts"]:
        lines += ["", *_part(part)]
    return "\n".join(lines) + "\n"


def _facts(record: dict[str, Any]) -> list[str]:
    machine, versions = record["machine"], record["versions"]
    lines = [f"commit: {record['commit'] or 'not known'}"]
    lines += [
        f"{name}: {machine[name]}" for name in ("gpu", "driver", "clocks", "processor", "cores") if name in machine
    ]
    lines += [", ".join(f"{name} {version}" for name, version in versions.items() if version)] if versions else []
    return lines


def _target(verdict: dict[str, Any]) -> str:
    measured = f", measured {verdict['shown']}" if verdict["shown"] else ""
    return f"{_INDENT}{verdict['verdict']:<8} {verdict['name']}: {verdict['target']}{measured}"


def _part(part: dict[str, Any]) -> list[str]:
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in part["outcomes"].items()) or "nothing ran"
    lines = [f"{part['name']}: {outcomes}; {part['seconds']:.0f} of {part['limit']:.0f} s"]
    lines += [f"{_INDENT}TROUBLE {_short(trouble)}" for trouble in part["trouble"]]
    for case in part["cases"]:
        if case["outcome"] in BAD:
            lines.append(f"{_INDENT}{case['outcome'].upper()} {case['name']}: {_short(case.get('error', ''))}")
            lines += [f"{_INDENT * 3}{line}" for line in case.get("traceback", [])[-6:]]
    for case in part["cases"]:
        lines += [f"{_INDENT}{line}" for line in _figures_of(case)]
    for outcome in (CUT_OFF, NOT_RUN):
        names = [case["name"] for case in part["cases"] if case["outcome"] == outcome]
        if names:
            lines.append(f"{_INDENT}{outcome}: " + "; ".join(names))
    return lines


def _figures_of(case: dict[str, Any]) -> list[str]:
    """What a case has found, in a line or two, where it is more than that all is well."""
    figures, name = case.get("figures") or {}, case["name"]
    if "share_of_copy" in figures:
        rate = (
            f"{figures['best'] / 1e9:.0f} GB/s, {figures['share_of_copy']:.0%} of a copy's {figures['copy'] / 1e9:.0f}"
        )
        return [f"{name}: {rate}"]
    if "reported_bytes" in figures:
        return [f"{name}: " + ", ".join(f"{key} {_shown(value)}" for key, value in figures.items())]
    if "prefills" in figures:
        excess = figures["prefills"]["excess"]
        return [f"{name}, beyond stock's: " + ", ".join(f"{look} {_percent(share)}" for look, share in excess.items())]
    return [line for result in figures.get("result", []) for line in _decoded(name, result)]


def _decoded(name: str, result: dict[str, Any]) -> list[str]:
    lines = [f"{name}:"]
    for one in result["candidates"]:
        ratio, share = one["ratio_to_stock"], one["kernel_share_of_ceiling"]
        words = [one["failure"]] if one["failure"] else []
        words += [f"{one['step_ms']:.2f} ms a step"] if one["step_ms"] else []
        words += [f"{ratio['median']:.2f} times stock"] if ratio else []
        words += [f"prefill {one['prefill']['seconds']:.2f} s"] if one["prefill"] else []
        words += [f"kernel {share:.0%} of a copy"] if share else []
        lines.append(f"{_INDENT}{one['name']}: " + (", ".join(words) or "nothing yet"))
    return lines


def _figures(results: Sequence[PartResult], name: str) -> dict[str, Any]:
    return next((c.get("figures", {}) for r in results for c in r.cases if c["name"] == name), {})


def _short(text: str) -> str:
    """The last of it, in one line."""
    return " / ".join(line.strip() for line in text.strip().splitlines() if line.strip())[-600:]


def _shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{share:+.0%}"
