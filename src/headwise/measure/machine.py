"""Machine: a device -> what a measurement depends on beside the code: processor, threads, device and versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from headwise.kernels.backends import instructions
from headwise.version import __version__


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Names and counts; sizes in bytes."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "instructions": instructions(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
    return found


def describe_versions() -> dict[str, str | None]:
    """Of everything that takes part."""
    return {
        "headwise": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
