"""Wheels with machine code: with FAVOR_NP_PREBUILD=1 the kernels are compiled while one is built.

With FAVOR_NP_PREBUILD=here they are compiled for this processor alone.  Without the variable, and for editable installs, the wheel is pure Python, and kernels are compiled where it
runs.  See tools/prebuild.py.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Prebuild(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the libraries of this platform."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """Return what compiling needs beside the build backend."""
        return list(self.metadata.core.dependencies) if _wanted() else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and name the platform."""
        if version != "standard" or not _wanted():
            return
        path = Path(self.root) / "tools" / "prebuild.py"
        spec = importlib.util.spec_from_file_location("prebuild", path)
        assert spec is not None
        assert spec.loader is not None
        prebuild = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(prebuild)
        folder = Path(self.directory) / "libraries"
        prebuild.main([str(folder), *(["--only", "here"] if _wanted() == "here" else [])])
        for file in folder.iterdir():
            build_data["force_include"][str(file)] = f"favor_np/cpu/libraries/{file.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"


def _wanted() -> str:
    wanted = os.environ.get("FAVOR_NP_PREBUILD", "0")
    if wanted not in ("0", "1", "here"):
        raise ValueError(f"FAVOR_NP_PREBUILD must be 0, 1 or here, got {wanted!r}")
    return wanted if wanted != "0" else ""


def _platform() -> str:
    """Name the platform: the libraries need neither Python nor a version of the C library."""
    name = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"manylinux_2_17_{name.removeprefix('linux_')}" if name.startswith("linux") else name
