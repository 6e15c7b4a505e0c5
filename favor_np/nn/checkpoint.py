"""Checkpoints: a model, its parameters and where training stands, in one safetensors file."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from typing import Any, NamedTuple

import numpy as np

from favor_np import storage, validation
from favor_np._version import __version__
from favor_np.nn.layer import Layer
from favor_np.nn.optim import AdamW
from favor_np.nn.tree import Array, Params, leaves, tree_of

#: What the names of the optimiser's moments begin with.
M, V = "adamw.m.", "adamw.v."


class Checkpoint(NamedTuple):
    """What `load` found.

    Attributes
    ----------
    model : Layer
        The model.
    params : dict
        Its parameters.
    optimizer : AdamW or None
        As it was, if it was saved.
    step : int
        The step that comes next.
    info : dict
        What else was saved.
    """

    model: Layer
    params: Params
    optimizer: AdamW | None
    step: int
    info: dict[str, Any]


def save(
    path: str | os.PathLike[str],
    model: Layer,
    params: Params,
    optimizer: AdamW | None = None,
    *,
    step: int = 0,
    **info: Any,
) -> None:
    """Write a checkpoint, whole or not at all.

    Parameters
    ----------
    path : str or os.PathLike
        The file, which is replaced if there is one.
    model : Layer
        The model: a class of `favor_np.nn`, or one of your own, which `load` then has to be given.
    params : dict
        Its parameters.
    optimizer : AdamW, optional
        The optimiser of these parameters.
    step : int, default 0
        The step that comes next.
    **info
        Anything else that JSON can hold.

    Raises
    ------
    ImportError
        If safetensors is missing.
    TypeError, ValueError
        If an argument is of the wrong type, or `path` is no regular file.

    Notes
    -----
    The arrays have their dotted names, the moments of the optimiser the same behind "adamw.m." and
    "adamw.v."; model, settings and step are JSON in the metadata. Nothing is pickled.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from favor_np import nn
    >>> model = nn.PerformerLM(vocab=256, dim=16, depth=1, heads=2, num_features=16)
    >>> params = model.init(np.random.default_rng(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     nn.save(f"{folder}/run.safetensors", model, params, step=100)
    ...     checkpoint = nn.load(f"{folder}/run.safetensors")
    >>> checkpoint.model == model, checkpoint.step
    (True, 100)
    """
    library = _safetensors()
    arrays = dict(leaves(params))
    about: dict[str, Any] = {
        "favor_np": __version__,
        "model": _described(model),
        "names": list(arrays),
        "step": validation.integer("step", step, minimum=0),
        "info": info,
    }
    if optimizer is not None:
        if list(arrays) != [name for name, _ in leaves(optimizer.params)]:
            raise ValueError("optimizer must be that of params, got one of other parameters")
        about["adamw"] = optimizer.settings | {"count": optimizer.count}
        for prefix, vector in ((M, optimizer.m), (V, optimizer.v)):
            arrays |= {prefix + name: x for name, x in _cut(params, vector).items()}
    content = {name: np.require(x, x.dtype.newbyteorder("<"), "C") for name, x in arrays.items()}
    data = library.save(content, {"favor_np.nn": json.dumps(about)})
    with storage.replacing(path) as file:
        file.write(data)


def ready(path: str | os.PathLike[str], model: Layer) -> None:
    """Refuse, before hours of training, what `save` would refuse after them."""
    _safetensors()
    json.dumps(_described(model))
    folder = storage.path_of("path", path).resolve().parent
    if not os.access(folder, os.W_OK):
        raise OSError(
            errno.EACCES if folder.is_dir() else errno.ENOENT, "cannot be written", str(folder)
        )


def load(path: str | os.PathLike[str], model: Layer | None = None) -> Checkpoint:
    """Read a checkpoint.

    Parameters
    ----------
    path : str or os.PathLike
        The file.
    model : Layer, optional
        The model, if it is of a class of your own.

    Returns
    -------
    Checkpoint
        ``.model``, ``.params``, ``.optimizer``, ``.step`` and ``.info``.

    Raises
    ------
    ImportError
        If safetensors is missing.
    OSError
        If there is no such file.
    ValueError
        If it is no checkpoint.

    Examples
    --------
    See `save`.
    """
    library = _safetensors()
    data = storage.path_of("path", path).read_bytes()
    try:
        about = _metadata(data)
        arrays = library.load(data)
        names = list(about["names"])  # in the order of the vector: the file has another
        params = tree_of({name: arrays[name] for name in names})
        if len(arrays) != len(names) * (3 if "adamw" in about else 1):
            raise ValueError(f"it must have the arrays {names}, got {sorted(arrays)}")
        optimizer = None
        if "adamw" in about:
            optimizer = _optimizer(params, dict(about["adamw"]), arrays)
        if model is None and about["model"].get("depth", 0) > len(names):  # it would never end
            raise ValueError(f"depth must be at most {len(names)}, the number of its arrays")
        found = _model(about["model"]) if model is None else model
        step = validation.integer("step", about["step"], minimum=0)
        return Checkpoint(found, params, optimizer, step, dict(about["info"]))
    except MemoryError:
        raise
    except Exception as error:  # bytes can be wrong in more ways than can be listed
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{os.fspath(path)} cannot be read as a checkpoint: {reason}") from error


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            "checkpoints need safetensors: pip install 'favor_np[nn]'", name="safetensors"
        ) from None
    return safetensors.numpy


def _metadata(data: bytes) -> dict[str, Any]:
    """Return what `save` wrote beside the arrays."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return dict(json.loads(header["__metadata__"]["favor_np.nn"]))


def _described(value: Any) -> Any:
    """Return a layer, or a field of one, as JSON has it."""
    if isinstance(value, Layer):
        fields = {
            f.name: _described(getattr(value, f.name))
            for f in dataclasses.fields(value)  # type: ignore[arg-type]
        }
        return {"class": _name(type(value))} | fields
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    return list(map(_described, value)) if isinstance(value, (tuple, list)) else value


def _name(cls: type[Layer]) -> str:
    """Return the name of a class of favor_np.nn, or module and name of any other."""
    from favor_np import nn

    name = cls.__name__
    return name if getattr(nn, name, None) is cls else f"{cls.__module__}.{cls.__qualname__}"


def _model(value: Any) -> Any:
    """Return what `_described` describes; only classes of this package are made."""
    if isinstance(value, list):
        return tuple(map(_model, value))
    if not isinstance(value, dict):
        return value
    from favor_np import nn

    fields = {name: _model(field) for name, field in value.items()}
    name = fields.pop("class")
    cls = getattr(nn, name) if name in nn.__all__ else None
    layer = isinstance(cls, type) and issubclass(cls, Layer)
    if not layer or cls is None:
        raise ValueError(f"its model is a {name}, which favor_np.nn has not: pass it to load")
    return cls(**fields)


def _cut(params: Params, vector: Array) -> dict[str, Array]:
    """Return the parts of a vector by the names of the parameters that they belong to."""
    parts, at = {}, 0
    for name, array in leaves(params):
        parts[name] = vector[at : at + array.size].reshape(array.shape)
        at += array.size
    return parts


def _optimizer(params: Params, settings: dict[str, Any], arrays: dict[str, Array]) -> AdamW:
    count = validation.integer("count", settings.pop("count"), minimum=0)
    given: Any = {n: tuple(x) if isinstance(x, list) else x for n, x in settings.items()}
    optimizer = AdamW(params, **given)
    optimizer.count = count
    for prefix, vector in ((M, optimizer.m), (V, optimizer.v)):
        for name, part in _cut(params, vector).items():
            if arrays[prefix + name].shape != part.shape:
                raise ValueError(f"{prefix + name} must have shape {part.shape}")
            part[...] = arrays[prefix + name]
    return optimizer
