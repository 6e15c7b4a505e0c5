"""Digests of sources that compiled code depends on."""

from __future__ import annotations

import hashlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple


class Sources(NamedTuple):
    """What compiled code depends on.

    `modules` are those outside the package of kernels whose text matters as it is now; `constants`
    those that have been imported before, of which kernels take the constants as they were loaded.
    """

    kernels: str
    modules: Sequence[str]
    constants: Sequence[ModuleType]

    def digest(self) -> str:
        """Return the digest; "" if the sources cannot be read."""
        try:
            parts = list(self._contents())
        except (AttributeError, ImportError, OSError):
            return ""
        total = hashlib.sha256()
        for part in parts:
            total.update(part)
        return total.hexdigest()[:16]

    def _contents(self) -> Iterator[bytes]:
        yield from map(_constants, self.constants)
        root = Path(__file__).parents[1]
        folder = root.joinpath(*self.kernels.split("."))
        if (folder / "__init__.py").exists():
            yield from (path.read_bytes() for path in sorted(folder.glob("*.py")))
            for name in self.modules:
                yield root.joinpath(*name.split(".")).with_suffix(".py").read_bytes()
            return
        # As their loaders know them: source or code.
        package = importlib.import_module(self.kernels)
        names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
        if not names:
            raise ImportError(f"the modules of {self.kernels} are not listed")
        for name in (*(f"{self.kernels}.{name}" for name in names), *self.modules):
            spec = importlib.util.find_spec(name)
            loader: Any = None if spec is None else spec.loader
            source = loader.get_source(name)
            if source is None:
                source = _described(loader.get_code(name))
            yield source.encode()


def _constants(module: ModuleType) -> bytes:
    """Return the constants of a module as loaded: its file may have changed since."""
    found = {name: x for name, x in vars(module).items() if name.isupper() and name[0] != "_"}
    return repr(sorted(found.items())).encode()


def _described(value: object) -> str:
    """Describe code, the same in every process: the bytes of marshal are not."""
    if isinstance(value, frozenset):
        return str(sorted(map(_described, value)))
    if isinstance(value, CodeType):
        names = value.co_names, value.co_varnames, value.co_cellvars, value.co_freevars
        counts = value.co_argcount, value.co_kwonlyargcount, value.co_flags
        return repr((value.co_code, names, counts, [*map(_described, value.co_consts)]))
    return repr(value)
