"""The digest of all sources that compiled code depends on."""

from __future__ import annotations

import hashlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from favor_np import jobs, numerics

_KERNELS = "favor_np.cpu.kernels"
#: Modules outside the kernels that their code depends on, as they are now; and those that have
#: been imported before, of which kernels take the constants.
_SHARED = ("favor_np.cpu.processor", "favor_np.cpu.record", "favor_np.cpu.records",
           "favor_np.cpu.tiles")  # fmt: skip
_EARLIER = (jobs, numerics)


def digest() -> str:
    """Return the digest; "" if the sources cannot be read."""
    try:
        parts = list(_contents())
    except (AttributeError, ImportError, OSError):
        return ""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:16]


def _contents() -> Iterator[bytes]:
    yield from map(_constants, _EARLIER)
    folder = Path(__file__).parent
    if (folder / "kernels" / "jit.py").exists():
        yield from (path.read_bytes() for path in sorted((folder / "kernels").glob("*.py")))
        for name in _SHARED:
            yield folder.joinpath(name.rpartition(".")[2]).with_suffix(".py").read_bytes()
        return
    # As their loaders know them: source or code.
    package = importlib.import_module(_KERNELS)
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    if not names:
        raise ImportError(f"the modules of {_KERNELS} are not listed")
    for name in (*(f"{_KERNELS}.{name}" for name in names), *_SHARED):
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


#: Now, before an editor changes what is being imported.
SOURCES = digest()
