"""Models of performer-pytorch 1.1.4 as models of `favor_np.nn`.

That package adds constants to its features and to its denominators. With ``eps="original"`` they
are there, and a model computes what it did; with ``eps=0`` they are not, and it is an ordinary
model of `favor_np.nn`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from favor_np import storage, validation
from favor_np.features import FeatureMap
from favor_np.gradients import favor_attention_vjp
from favor_np.nn import FavorSelfAttention, Performer, PerformerLM, ShiftTokens, astype, leaves
from favor_np.nn.layer import Key, Pullback
from favor_np.nn.tree import Array, Params

__all__ = ["load"]

Config: TypeAlias = Mapping[str, Any]

#: What is added to every feature of softmax attention; where the largest one is 1.
FEATURE_EPS = 1e-4
#: What is added to every sum of features of keys, in causal attention.
SUM_EPS = 1e-6
#: What is added to every feature of generalised attention.
KERNEL_EPS = 1e-3

_REQUIRED = object()
#: The arguments of both classes, and their defaults.
_OPTIONS: dict[str, Any] = {
    "dim": _REQUIRED,
    "depth": _REQUIRED,
    "heads": _REQUIRED,
    "local_attn_heads": 0,
    "local_window_size": 256,
    "causal": False,
    "ff_mult": 4,
    "nb_features": None,
    "feature_redraw_interval": 1000,
    "reversible": False,
    "ff_chunks": 1,
    "generalized_attention": False,
    "kernel_fn": "ReLU",
    "use_scalenorm": False,
    "use_rezero": False,
    "ff_glu": False,
    "ff_dropout": 0.0,
    "attn_dropout": 0.0,
    "cross_attend": False,
    "no_projection": False,
    "auto_check_redraw": True,
    "shift_tokens": False,
}
_CLASSES: dict[str, dict[str, Any]] = {
    "Performer": _OPTIONS | {"dim_head": _REQUIRED, "qkv_bias": True, "attn_out_bias": True},
    "PerformerLM": _OPTIONS
    | {
        "num_tokens": _REQUIRED,
        "max_seq_len": _REQUIRED,
        "dim_head": 64,
        "qkv_bias": False,
        "attn_out_bias": False,
        "emb_dropout": 0.0,
        "tie_embed": False,
        "rotary_position_emb": True,
        "axial_position_emb": False,
        "axial_position_shape": None,
    },
}
#: Options that are counts; those whose default is a bool are flags.
_COUNTS = (
    "dim", "depth", "heads", "dim_head", "ff_mult", "nb_features", "num_tokens", "max_seq_len",
)  # fmt: skip
#: Options that have no counterpart here, unless they have this value.
_UNSUPPORTED = {"reversible": False, "cross_attend": False, "no_projection": False}

#: The arrays of a branch: their names here and there.
_BRANCH = {
    "qkv.weight": ("to_q.weight", "to_k.weight", "to_v.weight"),
    "qkv.bias": ("to_q.bias", "to_k.bias", "to_v.bias"),
    "output.weight": ("to_out.weight",),
    "output.bias": ("to_out.bias",),
    "projection": ("fast_attention.projection_matrix",),
    "up.weight": ("w1.weight",),
    "up.bias": ("w1.bias",),
    "down.weight": ("w2.weight",),
    "down.bias": ("w2.bias",),
}
#: The other arrays of a language model.
_ENDS = {
    "embedding.weight": "token_emb.weight",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "head.weight": "to_out.weight",
    "head.bias": "to_out.bias",
}
#: What a state dict has that is no weight: tables, a counter, and every weight a second time.
_NO_WEIGHT = re.compile(
    r"(layer_)?pos_emb\.emb|(.*\.)?proj_updater\.(calls_since_last_redraw|instance\..*)"
)


def load(
    weights: str | os.PathLike[str] | Mapping[str, Any],
    config: str | os.PathLike[str] | Config,
    eps: Literal["original", 0] = "original",
) -> tuple[Performer, Params]:
    """Make a model of `favor_np.nn` of a Performer or PerformerLM of performer-pytorch 1.1.4.

    Parameters
    ----------
    weights : str, os.PathLike or mapping
        A safetensors file, or arrays by their names in the state dict.
    config : str, os.PathLike or mapping
        ``{"class_name": "PerformerLM", "kwargs": {...}}``, or a JSON file of it. The arguments that
        are not among `kwargs` have their defaults.
    eps : {"original", 0}, default "original"
        "original": with the constants that performer-pytorch adds, so with the same output. 0:
        without them, as a plain `favor_np.nn.Performer` or `favor_np.nn.PerformerLM`.

    Returns
    -------
    model : favor_np.nn.Performer or favor_np.nn.PerformerLM
        The model.
    params : dict
        Its parameters, in float64 if the weights are, else in float32.

    Raises
    ------
    ImportError
        If `weights` is a file and safetensors is missing.
    OSError
        If there is no such file.
    TypeError, ValueError
        If an option is not supported, or the weights are not those of `config`.

    Notes
    -----
    `reversible`, `cross_attend`, `no_projection`, heads of local attention, and kernels other than
    ReLU are not supported. Dropout of attention and feed-forward layers is left out: train with
    ``model.replace(dropout=...)``. Biases that the original has not are zeros.

    ``return_encodings`` has no counterpart, and `mask` leaves keys out, where the original only
    sets their values to zero, and with `shift_tokens` what attention sees of them in other rows;
    with ``eps="original"`` it does that, too.

    In performer-pytorch, the largest feature of all keys is the unit of what is added to features:
    earlier rows depend on later ones, even in causal models. So with ``eps="original"`` every token
    that is generated costs a pass over the whole text, as it does there; with ``eps=0`` all tokens
    cost the same.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np.interop import performer_pytorch
    >>> config = {"class_name": "Performer", "kwargs": {"dim": 4, "depth": 0, "heads": 1}}
    >>> performer_pytorch.load({}, config)
    Traceback (most recent call last):
    ValueError: config must give the argument dim_head of Performer
    """
    if eps != "original" and (isinstance(eps, bool) or eps != 0):
        raise ValueError(f"eps must be 'original' or 0, got {eps!r}")
    name, options = _checked(config)
    arrays = _Arrays(name, weights)
    model = _model(name, options, original=eps == "original")
    params = astype(model.init(np.random.default_rng(0)), arrays.dtype)
    for leaf, array in leaves(params):
        array[...] = arrays.take(leaf, array, options)
    arrays.finish()
    return model, params


def _checked(config: Any) -> tuple[str, dict[str, Any]]:
    """Return the name of the class, and all its arguments."""
    if not isinstance(config, Mapping):
        config = _read_config(config)
    if not isinstance(config, Mapping) or not {"class_name", "kwargs"} <= set(config):
        raise ValueError("config must have class_name and kwargs")
    name, given = config["class_name"], config["kwargs"]
    if name not in list(_CLASSES):
        raise ValueError(f"class_name must be one of {', '.join(_CLASSES)}, got {name!r}")
    if not isinstance(given, Mapping):
        raise TypeError(f"kwargs must be a mapping, got {validation.got(given)}")
    unknown = sorted(map(str, given.keys() - _CLASSES[name].keys()))
    if unknown:
        raise ValueError(f"config must give arguments of {name}, got {', '.join(unknown)}")
    options = _CLASSES[name] | dict(given)
    for option, value in options.items():
        if value is _REQUIRED:
            raise ValueError(f"config must give the argument {option} of {name}")
    for option, value in _UNSUPPORTED.items():
        if options[option] != value:
            raise ValueError(f"{option}={options[option]!r} is not supported")
    if np.any(options["local_attn_heads"]):
        raise ValueError(f"local_attn_heads={options['local_attn_heads']!r} is not supported")
    kernel = options["kernel_fn"]
    if options["generalized_attention"] and _name(kernel) not in ("ReLU", "relu"):
        raise ValueError(f"kernel_fn={_name(kernel)} is not supported, only ReLU is")
    for option, default in _CLASSES[name].items():
        if isinstance(default, bool):
            options[option] = validation.flag(option, options[option])
    for option in filter(options.__contains__, _COUNTS):
        if options[option] is not None or option not in ("dim_head", "nb_features"):
            options[option] = validation.integer(option, options[option])
    if options["dim_head"] is None:
        each = options["dim"] // options["heads"]
        options["dim_head"] = validation.integer("dim_head", each)
    if options["nb_features"] is None:
        options["nb_features"] = int(options["dim_head"] * math.log(options["dim_head"]))
    return name, options


def _read_config(path: Any) -> Any:
    path = storage.path_of("config", path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None


def _name(kernel: Any) -> str:
    """Return the name of a kernel: a module of PyTorch, its class, a function, or text of them."""
    if isinstance(kernel, str):
        return kernel.partition("(")[0].rpartition(".")[2]
    return str(getattr(kernel, "__name__", type(kernel).__name__))


def _model(name: str, options: dict[str, Any], *, original: bool) -> Performer:
    dim, scale, gate = options["dim"], options["use_scalenorm"], options["use_rezero"]
    generalized = options["generalized_attention"]
    fields: dict[str, Any] = {
        "dim": dim,
        "depth": options["depth"],
        "heads": options["heads"],
        "dim_head": options["dim_head"],
        "num_features": options["nb_features"],
        "causal": bool(options["causal"]),
        "kind": "relu" if generalized else "positive",
        "antithetic": False,
        "kernel_epsilon": KERNEL_EPS,
        "qk": None,
        "hidden": dim * options["ff_mult"],
        "activation": "geglu" if options["ff_glu"] else "gelu",
        "norm": "scale" if scale else None if gate else "layer",
        "final_norm": False,
        "gate": bool(gate and not scale),
        "shift": bool(options["shift_tokens"]),
        "qkv_bias": bool(options["qkv_bias"]),
        "bias": True,
    }
    if name == "Performer":
        return (OriginalPerformer if original else Performer)(**fields)
    rotary = options["rotary_position_emb"]
    fields |= {
        "vocab": options["num_tokens"],
        "rotary": "adjacent" if rotary else None,
        "positions": "sinusoidal" if rotary else "learned",
        "length": min(options["max_seq_len"], math.prod(_axes(options))),
        "final_norm": "layer",
        "tied": bool(options["tie_embed"]),
        "embedding_dropout": options["emb_dropout"],
    }
    return (OriginalPerformerLM if original else PerformerLM)(**fields)


def _axes(options: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape of the grid of learned positions: one axis, if it is none."""
    length, shape = options["max_seq_len"], options["axial_position_shape"]
    if options["rotary_position_emb"] or not options["axial_position_emb"]:
        return (length,)
    if shape is None:
        return (-(-length // 64), 64)
    if isinstance(shape, str) or not np.iterable(shape):
        raise TypeError(f"axial_position_shape must be integers, got {validation.got(shape)}")
    return tuple(validation.integer("axial_position_shape", count) for count in shape)


class _Arrays:
    """The arrays of a state dict, which are taken one after the other."""

    def __init__(self, name: str, weights: Any) -> None:
        if not isinstance(weights, Mapping):
            weights = _read(weights)
        # A wrapper (AutoregressiveWrapper) puts its own name before the others.
        wrapped = name == "PerformerLM" and "net.token_emb.weight" in weights
        before = "net." if wrapped else ""
        self._left = {
            str(key).removeprefix(before): _floats(str(key), weights[key])
            for key in weights
            if not _NO_WEIGHT.fullmatch(str(key).removeprefix(before))
        }
        double = any(array.dtype == np.float64 for array in self._left.values())
        self.dtype = np.dtype(np.float64 if double else np.float32)
        self._net = "performer.net." if name == "PerformerLM" else "net."

    def take(self, name: str, like: Array, options: dict[str, Any]) -> Array:
        """Return what belongs into the array that has this name here."""
        if name == "positions.weight":
            return self._positions(like, options)
        if name in _ENDS:
            return self._get(_ENDS[name], like.shape)
        _, block, part, kind = name.split(".", 3)
        at = f"{self._net}layers.{block}.{int(part == 'feedforward')}."
        if kind == "gate" or (kind == "norm.weight" and options["use_scalenorm"]):
            return self._get(at + "g", like.shape)
        if not kind.startswith("branch."):
            return self._get(at + kind, like.shape)
        names, shape = _BRANCH[kind.removeprefix("branch.")], like.shape
        if names == ("to_out.bias",) and not options["attn_out_bias"]:
            return np.zeros(shape)
        within = 1 + bool(options["shift_tokens"]) + (part == "feedforward")
        each = (shape[0] // len(names), *shape[1:])
        return np.concatenate([self._get(at + "fn." * within + n, each) for n in names])

    def _positions(self, like: Array, options: dict[str, Any]) -> Array:
        """Return learned positions; those of a grid are sums of those of its axes."""
        if not options["axial_position_emb"]:
            return self._get("pos_emb.emb.weight", like.shape)
        axes, dim = _axes(options), like.shape[-1]
        table = np.zeros((*axes, dim), self.dtype)
        for axis, count in enumerate(axes):
            shape = [1] * (len(axes) + 2)
            shape[axis + 1], shape[-1] = count, dim
            old = f"pos_emb.weights_{axis}"  # in old versions of axial-positional-embedding
            new = f"pos_emb.weights.{axis}"
            table += self._get(old if old in self._left else new, tuple(shape))[0]
        return table.reshape(-1, dim)[: len(like)]

    def _get(self, name: str, shape: tuple[int, ...]) -> Array:
        array = self._left.pop(name, None)
        if array is None:
            raise ValueError(f"weights must have {name}, of shape {shape}, but have not")
        if array.shape != shape and (array.size != 1 or shape != (1,)):
            raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite")
        return array.reshape(shape)

    def finish(self) -> None:
        """Check that all are taken."""
        if self._left:
            some = ", ".join(sorted(self._left)[:5])
            raise ValueError(f"weights have arrays that a model of this config has not: {some}")


def _floats(name: str, value: Any) -> Array:
    array = validation.array_of(name, value)
    if array.dtype.kind in "biu":
        raise TypeError(f"{name} must hold floats, got dtype {array.dtype}")
    return validation.tensor(name, array, 0)


def _read(path: Any) -> dict[str, Array]:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            "files of weights need safetensors: pip install 'favor_np[nn]'", name="safetensors"
        ) from None
    data = storage.path_of("weights", path).read_bytes()
    try:
        return dict(safetensors.numpy.load(data))
    except Exception as error:  # bytes can be wrong in more ways than can be listed
        raise ValueError(f"{os.fspath(path)} cannot be read as safetensors: {error}") from error


@lru_cache(maxsize=16)
def _sums(count: int, dtype: np.dtype[Any]) -> FeatureMap:
    """Return the map whose features are numbers, none below 0, plus `FEATURE_EPS`."""
    return FeatureMap.from_projection(
        np.eye(count, dtype=dtype), "relu", scale=1.0, kernel_epsilon=FEATURE_EPS
    )


@dataclass(frozen=True)
class OriginalAttention(FavorSelfAttention):
    """`favor_np.nn.FavorSelfAttention` with the constants that performer-pytorch adds.

    Parameters
    ----------
    shift : bool, default False
        Whether `favor_np.nn.ShiftTokens` comes before it: what comes from a masked row is zero.

    Notes
    -----
    Softmax features are ``exp(w x - |x|**2 / 2 - c) + 1e-4``, where c is the largest ``w x`` of a
    query, or of all keys of a head. So features without the sum are computed here, and go through
    ReLU features, whose projection is the identity and whose constant is 1e-4. In causal attention
    1e-6 is added to every sum of features of keys: that is one more key, before all others, whose
    value is zero.
    """

    shift: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        for name in ("decay", "qk"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} must be None, got {getattr(self, name)!r}")
        if self._antithetic or self.learn_projection or self.kind == "elu":
            raise ValueError("antithetic, learn_projection and kind='elu' are not supported")

    def vjp(
        self, params: Params, x: Any, *, key: Key | None = None, mask: Any = None
    ) -> tuple[Array, Pullback]:
        """Attend, given rows some of whose columns come from other rows."""
        if mask is None or not self.shift:
            return super().vjp(params, x, key=key, mask=mask)
        shift = ShiftTokens(self.causal)
        moved = shift.apply({}, np.ones((1, self.dim))) == 0  # the columns: there is no other row
        hidden = np.broadcast_to(~np.asarray(mask)[..., None] & moved, np.shape(x))
        kept = ~shift.apply({}, hidden)
        y, pull = super().vjp(params, np.where(kept, x, 0), key=key, mask=mask)
        return y, lambda grad, grads: np.where(kept, pull(grad, grads), 0)

    def attend_vjp(
        self, params: Params, q: Any, k: Any, v: Any, *, key_mask: Any = None, **options: Any
    ) -> tuple[Any, Any]:
        """Attend with random features, and what the package adds to them."""
        kept = None if key_mask is None else np.broadcast_to(key_mask, k.shape[:-1])[..., None]
        if kept is not None:
            v = np.where(kept, v, 0)
        fm, pull_q, pull_k = self.feature_map(params), _same, _same
        if self.kind == "positive":
            q, pull_q = _features(q, fm, (-1,))
            k, pull_k = _features(k, fm, (-1, -2))
            fm = _sums(q.shape[-1], q.dtype)
        if self.causal:
            q, k, v = (np.pad(x, [(0, 0)] * (x.ndim - 2) + [(1, 0), (0, 0)]) for x in (q, k, v))
            share = SUM_EPS / KERNEL_EPS
            if self.kind == "positive":  # whose features they multiply with num_features**-0.5
                share = SUM_EPS / FEATURE_EPS * self.num_features**0.5
            bias = np.zeros(k.shape[-2], k.dtype)
            bias[0] = math.log(share)
            options["key_bias"] = bias
        out, pull = favor_attention_vjp(q, k, v, fm, **options)
        first = int(self.causal)

        def pullback(grad: Array) -> Any:
            if self.causal:
                grad = np.pad(grad, [(0, 0)] * (grad.ndim - 2) + [(1, 0), (0, 0)])
            found = pull(grad)
            dq, dk, dv = (x[..., first:, :] for x in (found.q, found.k, found.v))
            dv = dv if kept is None else np.where(kept, dv, 0)
            found.q, found.k, found.v = pull_q(dq), pull_k(dk), dv
            return found

        return out[..., first:, :], pullback


def _same(grad: Array) -> Array:
    return grad


def _features(x: Array, fm: FeatureMap, axes: tuple[int, ...]) -> tuple[Array, Any]:
    """Return features as performer-pytorch has them, without what it adds, and their pullback."""
    scale = x.dtype.type(fm.scale**0.5)
    w = fm.projection.astype(x.dtype, copy=False)
    scaled = scale * x
    logits = scaled @ w.T
    height = np.einsum("...i,...i->...", scaled, scaled)[..., None] / 2
    y = np.exp(logits - height - logits.max(axes, keepdims=True))

    def pullback(grad: Array) -> Array:
        through = grad * y
        back: Array = scale * (through @ w - through.sum(-1, keepdims=True) * scaled)
        return back

    return y, pullback


@dataclass(frozen=True, kw_only=True)
class OriginalPerformer(Performer):
    """`favor_np.nn.Performer` with `OriginalAttention`; see `load`."""

    attention: ClassVar[type[FavorSelfAttention]] = OriginalAttention

    def extend(self, params: Params, state: dict[str, Any], x: Any) -> Array:
        """Return the output for the rows that follow, from all rows: see `load`."""
        return _extended(self, super().extend, (params, state, np.asarray(x)), -2)


@dataclass(frozen=True, kw_only=True)
class OriginalPerformerLM(PerformerLM):
    """`favor_np.nn.PerformerLM` with `OriginalAttention`; see `load`."""

    attention: ClassVar[type[FavorSelfAttention]] = OriginalAttention

    def extend(self, params: Params, state: dict[str, Any], x: Any) -> Array:
        """Return the output for the rows that follow, from all rows: see `load`."""
        return _extended(self, super().extend, (params, state, np.asarray(x)), -1)


def _extended(model: Performer, extend: Any, arguments: Any, axis: int) -> Array:
    """Extend by computing all rows again: with what comes now, all those before change."""
    params, state, x = arguments
    if model.exact or not model.causal:
        found: Array = extend(params, state, x)
        return found
    rows = np.concatenate([state["rows"], x], axis) if "rows" in state else x
    state["rows"] = rows
    return model.apply(params, rows)[..., rows.shape[axis] - x.shape[axis] :, :]
