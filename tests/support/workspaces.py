"""What the package keeps between calls: workspaces, and the layouts of maps."""

import importlib


def _cpu(name):
    """A module that keeps them; it loads Numba, which the import of this one must not do."""
    return importlib.import_module(f"favor_np.cpu.{name}")


def kept_workspaces():
    """The arrays that this thread keeps for its next calls."""
    return [array for arrays in _cpu("memory")._spare.kept.values() for array in arrays]


def is_kept(workspace, threads):
    """Whether this thread keeps the arrays of that plan of a workspace."""
    return (workspace, threads) in _cpu("memory")._spare.kept


def poison_workspaces():
    """Fill what this thread keeps for its next calls with NaN."""
    for array in kept_workspaces():
        if array.dtype.kind == "f":
            array.fill(float("nan"))


def forget_workspaces():
    _cpu("memory")._spare.kept.clear()


def forget_layouts():
    """Forget how maps are laid out: equal maps would find what an earlier one was given."""
    _cpu("layout").layout.cache_clear()
    _cpu("schedule").schedule.cache_clear()
