"""Build hook: compiles the CPU kernels into the package; without a compiler the package is built without them."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileKernels(BuildHookInterface):  # type: ignore[type-arg]  # the configuration is not used
    """Runs `csrc/compile.py` before a wheel, or an editable installation, is put together."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say for which machines the wheel is."""
        if self.target_name != "wheel":
            return
        script = runpy.run_path(str(Path(self.root) / "src/headwise/kernels/cpu/csrc/compile.py"))
        try:
            library = script["compile_library"]()
        except RuntimeError as error:
            # `headwise doctor` and the cache itself say so too, when it matters.
            self.app.display_warning(f"headwise is installed without its compiled CPU kernels: {error}")
            return
        build_data["pure_python"] = False
        build_data["artifacts"].append(str(library.relative_to(self.root)))
        # Neither Python's nor torch's binary interface is used: one wheel serves all of them on a platform.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
