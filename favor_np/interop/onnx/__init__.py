"""FAVOR+ attention as an ONNX graph, for whatever runs such graphs: no Python, no favor_np."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

try:
    import onnx
except ImportError:
    raise ImportError(
        "favor_np.interop.onnx needs onnx: pip install 'favor_np[onnx]'", name="onnx"
    ) from None

from favor_np import AttentionState, FeatureMap, storage, validation
from favor_np.features import ATTENTION_KINDS, checked
from favor_np.interop.onnx import forms
from favor_np.interop.onnx.graph import TYPES, Graph, end
from favor_np.interop.onnx.models import empty_state, export_model

__all__ = ["empty_state", "export_attention", "export_model", "from_onnx_state", "to_onnx_state"]

Array: TypeAlias = npt.NDArray[Any]


def export_attention(
    feature_map: FeatureMap,
    *,
    heads: int,
    value_dim: int,
    kv_heads: int | None = None,
    causal: bool = True,
    key_mask: bool = False,
    key_bias: bool = False,
    decay: npt.ArrayLike | Literal["input"] | None = None,
    form: str = "auto",
    opset: int = 17,
    dtype: npt.DTypeLike | None = None,
) -> onnx.ModelProto:
    """Return attention with a feature map as an ONNX model.

    The model's batch and numbers of positions are free.  It takes and returns a state, so that a
    sequence can go on where it stopped, a token at a time if need be.

    Parameters
    ----------
    feature_map : FeatureMap
        Any kind but "trig".  If every head has its own, they are those of keys and values.
    heads : int
        Heads of queries.
    value_dim : int
        Length dv of a value.
    kv_heads : int, optional
        Heads of keys and values, of which `heads` is a multiple; default `heads`.
    causal : bool, default True
        Query i sees keys up to i only.
    key_mask : bool, default False
        Whether the model has an input that says which keys take part.
    key_bias : bool, default False
        Whether it has one of numbers that are added to the logits of keys.
    decay : array_like of float or "input", optional
        In (0, 1], one number or one a head of keys; at every token the weight of all earlier keys
        is multiplied with it.  "input": the model has an input of such factors, one a token and
        head of keys.  Causal only.
    form : {"auto", "chunk", "gated", "whole"}, default "auto"
        How the graph is written.  "auto" is "chunk" if causal, else "whole".

        - "chunk": plain operators, the fastest for many positions.
        - "gated": the operator LinearAttention, the fastest for one token, of onnxruntime 1.25.1
          and later (``com.microsoft``), or the standard one if `opset` is 27.
        - "whole": plain operators, for attention that is not causal.
    opset : int, default 17
        Version of the standard operators, from 14 to 27.  Larger ones need newer runtimes.
    dtype : {float16, float32, float64}, optional
        Of queries, keys, values and the result; default that of the projection.  float16 is
        computed in float32, "gated" is not for float64.

    Returns
    -------
    onnx.ModelProto
        Checked by onnx.  Inputs are

        - ``q`` (batch, positions, heads * d), ``k`` (batch, positions, kv_heads * d) and ``v``
          (batch, positions, kv_heads * dv); not causal, ``k`` and ``v`` may have other positions;
        - ``key_mask`` (batch, positions) of bool, if asked for;
        - ``key_bias`` (batch, positions, kv_heads), if asked for; -inf masks a key;
        - ``decay`` (batch, positions, kv_heads), if it is an input;
        - ``past_state`` (batch, kv_heads, M, dv + 1) and ``past_max`` (batch, kv_heads, M), of
          float32, or float64 like the rest; before the first key zeros and -1e30;
        - ``past_length`` (batch) of int64 with a decay: how many tokens are in the state; or
          ``past_decay`` (batch, kv_heads) of float64 if it is an input, 0 before the first key.

        Outputs are ``out`` (batch, positions, heads * dv), ``present_state``, ``present_max`` and
        with a decay ``present_length`` or ``present_decay``.

    Raises
    ------
    ImportError
        By ``import favor_np.interop.onnx``, if onnx is not installed.
    TypeError
        If an argument has the wrong type.
    ValueError
        If numbers of heads do not fit, an option is unknown, or two do not go together.

    See Also
    --------
    favor_np.favor_attention : The same on NumPy arrays.
    to_onnx_state, from_onnx_state : A state that favor_np began, and one that it goes on with.

    Notes
    -----
    No finite queries and keys give NaN.  Rows whose log-features pass 2**20 are cut to what does
    not, number by number, biases beyond 2**22 to that, values beyond 2**100, and factors a token
    below 1e-30.  Unlike favor_np, a model does not keep what rounding takes from its sums:
    in float32 that is felt after some ten thousand calls that go on from each other.

    Examples
    --------
    >>> import numpy as np
    >>> import onnxruntime
    >>> import favor_np
    >>> from favor_np.interop.onnx import export_attention, to_onnx_state
    >>> fm = favor_np.feature_map("positive", dim=8, num_features=64)
    >>> model = export_attention(fm, heads=2, value_dim=4)
    >>> session = onnxruntime.InferenceSession(model.SerializeToString())
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((1, 100, 2 * n), np.float32) for n in (8, 8, 4))
    >>> empty = to_onnx_state(favor_np.AttentionState.zeros(fm, value_dim=4, batch_shape=2))
    >>> out, state, highest = session.run(None, {"q": q, "k": k, "v": v, **empty})
    >>> def apart(x):
    ...     return x.reshape(100, 2, -1).swapaxes(0, 1)
    >>> expected = favor_np.favor_attention(apart(q), apart(k), apart(v), fm, causal=True)
    >>> bool(abs(apart(out) - expected).max() < 1e-5)
    True
    """
    fm = checked(feature_map, ATTENTION_KINDS)
    heads, kv_heads = _heads(fm, heads, kv_heads)
    causal = validation.flag("causal", causal)
    if isinstance(decay, str):
        validation.choice("decay", decay, ("input",))
        rates = None
        if not causal:
            raise ValueError("decay needs causal=True")
    else:
        rates = validation.decay_rates(decay, (kv_heads,), causal=causal)
    io = _dtype(fm, dtype)
    a = forms.Attention(
        feature_map=fm,
        heads=heads,
        kv_heads=kv_heads,
        value_dim=validation.integer("value_dim", value_dim),
        causal=causal,
        real=np.dtype(np.float64 if io == np.float64 else np.float32),
        io=io,
    )
    graph = Graph(validation.integer("opset", opset), a.real)
    form = forms.form_of(form, a.real, causal=causal)
    given = forms.Given(
        "q",
        "k",
        "v",
        "past_state",
        "past_max",
        mask="key_mask" if validation.flag("key_mask", key_mask) else None,
        bias="key_bias" if validation.flag("key_bias", key_bias) else None,
    )
    inputs, outputs = _ends(a, graph, given)
    if isinstance(decay, str):
        inputs.insert(-2, end("decay", TYPES[io.name], "batch", "positions", kv_heads))
        inputs.append(end("past_decay", TYPES["float64"], "batch", kv_heads))
        outputs.append(end("present_decay", TYPES["float64"], "batch", kv_heads))
        clock, left = forms.token_clock(graph, "decay", "past_decay")
        graph.named(left, "present_decay")
        given = given._replace(clock=clock)
    elif rates is not None:
        inputs.append(end("past_length", TYPES["int64"], "batch"))
        outputs.append(end("present_length", TYPES["int64"], "batch"))
        count = graph.Gather(graph.Shape("k"), [1])
        clock = forms.clock(graph, rates * np.log(2), "past_length", count)
        graph.named(graph.Add("past_length", count), "present_length")
        given = given._replace(clock=clock)
    out, sums, c = forms.write(form, a, graph, given)
    for name, x in (("out", out), ("present_state", sums), ("present_max", c)):
        graph.named(x, name)
    facts = {
        "form": form,
        "fingerprint": fm.fingerprint,
        "heads": heads,
        "kv_heads": kv_heads,
        "dim": fm.dim,
        "value_dim": a.value_dim,
        "num_features": fm.num_features,
        "causal": causal,
        "decay": np.exp2(-rates).tolist() if rates is not None else decay,
    }
    return graph.model("favor_attention", inputs, outputs, facts)


def _heads(fm: FeatureMap, heads: object, kv_heads: object) -> tuple[int, int]:
    """Check the numbers of heads."""
    queries = validation.integer("heads", heads)
    keys = queries if kv_heads is None else validation.integer("kv_heads", kv_heads)
    if queries % keys:
        raise ValueError(f"heads must be a multiple of kv_heads, got {queries} and {keys}")
    if fm.num_heads not in (None, keys):
        raise ValueError(
            f"kv_heads must be the {fm.num_heads} heads of the feature map, got {keys}"
        )
    return queries, keys


def _dtype(fm: FeatureMap, dtype: Any) -> np.dtype[Any]:
    if dtype is None:
        return np.dtype(fm.projection.dtype)
    name = None
    with contextlib.suppress(TypeError):
        name = np.dtype(dtype).name
    if name not in ("float16", "float32", "float64"):
        raise TypeError(f"dtype must be float16, float32 or float64, got {validation.got(dtype)}")
    kind: np.dtype[Any] = np.dtype(name)
    return kind


def _ends(a: forms.Attention, graph: Graph, given: forms.Given) -> tuple[list[Any], list[Any]]:
    """Return names and shapes of what goes in and out."""
    io, dim = TYPES[a.io.name], a.feature_map.dim
    state = "batch", a.kv_heads, a.feature_map.num_features
    keys = "batch", "positions" if a.causal else "key_positions"
    inputs = [
        end("q", io, "batch", "positions", a.heads * dim),
        end("k", io, *keys, a.kv_heads * dim),
        end("v", io, *keys, a.kv_heads * a.value_dim),
    ]
    if given.mask:
        inputs.append(end("key_mask", TYPES["bool"], *keys))
    if given.bias:
        inputs.append(end("key_bias", io, *keys, a.kv_heads))
    inputs += [
        end("past_state", graph.type, *state, a.columns),
        end("past_max", graph.type, *state),
    ]
    outputs = [
        end("out", io, "batch", "positions", a.heads * a.value_dim),
        end("present_state", graph.type, *state, a.columns),
        end("present_max", graph.type, *state),
    ]
    return inputs, outputs


def to_onnx_state(state: AttentionState) -> dict[str, Array]:
    """Return a state as the inputs of an exported model: what favor_np began goes on elsewhere.

    Parameters
    ----------
    state : AttentionState
        With a `batch_shape` of (batch, kv_heads), (kv_heads,), or () for one head, and without
        `sequences`.  An empty one is what a model begins with.

    Returns
    -------
    dict of str to ndarray
        ``past_state``, ``past_max`` and, if the state has a decay, ``past_length``; or if factors a
        token have made it fade, ``past_decay``, which is zero.

    Raises
    ------
    TypeError
        If `state` is no AttentionState.
    ValueError
        If it has more axes, or packed sequences.

    Examples
    --------
    >>> import favor_np
    >>> from favor_np.interop.onnx import to_onnx_state
    >>> fm = favor_np.feature_map("positive", dim=8, num_features=64)
    >>> empty = to_onnx_state(favor_np.AttentionState.zeros(fm, value_dim=4, batch_shape=(1, 2)))
    >>> empty["past_state"].shape, empty["past_max"].shape
    ((1, 2, 64, 5), (1, 2, 64))
    """
    if not isinstance(state, AttentionState):
        raise TypeError(f"state must be an AttentionState, got {validation.got(state)}")
    if state.sequences is not None or len(state.batch_shape) > 2:
        raise ValueError(
            "state must have a batch_shape of (batch, kv_heads) at most, and no sequences, got "
            f"{state.batch_shape} and sequences={state.sequences}"
        )
    snapshot = state.copy()
    lead = (1,) * (2 - len(state.batch_shape)) + state.batch_shape
    c, s, z = (x.reshape(*lead, *x.shape[len(state.batch_shape) :]) for x in _sums(snapshot))
    height = c * np.log(2)
    lengths = snapshot.lengths.reshape(lead)
    if state.decay is not None:
        height += _fraction(state.decay.reshape(lead), lengths)[..., None]
    highest = np.ceil(height)
    sums = np.concatenate([s, z[..., None]], axis=-1) * np.exp(height - highest)[..., None]
    arrays = {
        "past_state": sums.astype(state.dtype),
        "past_max": np.where(z == 0, forms.NOTHING, highest).astype(state.dtype),
    }
    if state.decay is not None:
        arrays["past_length"] = lengths[:, 0].copy()
    if snapshot._fade is not None:  # it is in the sums
        arrays["past_decay"] = np.zeros(lead)
    return arrays


def from_onnx_state(
    feature_map: FeatureMap,
    arrays: Mapping[str, npt.ArrayLike],
    *,
    decay: npt.ArrayLike | None = None,
) -> AttentionState:
    """Return the state that a model gave back: what began elsewhere goes on in favor_np.

    Parameters
    ----------
    feature_map : FeatureMap
        That of the model.
    arrays : mapping of str to array_like
        The model's ``present_state``, ``present_max`` and, with a decay, ``present_length`` or
        ``present_decay``; or the same with ``past``.
    decay : array_like of float, optional
        That of the model, if it is no input.

    Returns
    -------
    AttentionState
        With a `batch_shape` of (batch, kv_heads).

    Raises
    ------
    TypeError
        If an array does not hold real numbers, or lengths are not integers.
    ValueError
        If an array is missing, or shapes do not fit each other or the map.

    Notes
    -----
    Without a decay the model does not count tokens: `lengths` of the state are 0.

    Examples
    --------
    >>> import numpy as np
    >>> import favor_np
    >>> from favor_np.interop.onnx import from_onnx_state, to_onnx_state
    >>> fm = favor_np.feature_map("positive", dim=4, num_features=64)
    >>> state = favor_np.AttentionState.zeros(fm, value_dim=2, batch_shape=(1, 1))
    >>> x = np.ones((1, 1, 3, 4), np.float32)
    >>> back = from_onnx_state(fm, to_onnx_state(state.update(x, x[..., :2])))
    >>> back.attend(x[..., :1, :]).round(6)
    array([[[[1., 1.]]]], dtype=float32)
    """
    fm = checked(feature_map, ATTENTION_KINDS)
    sums = _found(arrays, "state", 4)
    highest = _found(arrays, "max", 3)
    features = fm.num_features
    if sums.shape[:3] != highest.shape or sums.shape[2] != features or sums.shape[3] < 2:
        raise ValueError(
            f"state and max must have shapes (batch, kv_heads, {features}, dv + 1) and (batch, "
            f"kv_heads, {features}), got {sums.shape} and {highest.shape}"
        )
    batch, lead = len(sums), sums.shape[:2]
    kind = np.dtype(np.float64 if sums.dtype == np.float64 else np.float32)
    state = AttentionState.zeros(fm, sums.shape[3] - 1, lead, decay=decay, dtype=kind)
    lengths = np.zeros(lead, np.int64)
    height = highest.astype(np.float64)
    if state.decay is not None:
        given = np.asarray(_named(arrays, "length"))
        if given.dtype.kind not in "iu":
            raise TypeError(f"length must hold integers, got {validation.got(given)}")
        if given.shape != (batch,) or (given < 0).any():
            raise ValueError(
                f"length must be {batch} numbers of tokens, got {validation.got(given)}"
            )
        lengths[...] = given[:, None]
        rates = -np.log2(state.decay)
        height += (lengths * rates % 1.0 * np.log(2) - _fraction(state.decay, lengths))[..., None]
    if "present_decay" in arrays or "past_decay" in arrays:
        before = _found(arrays, "decay", 2)
        if before.shape != lead:
            raise ValueError(f"decay must have shape {lead}, got {before.shape}")
        height -= before[..., None]
    empty = sums[..., -1] == 0
    rebuild, parts = state.__reduce__()
    parts = storage.Parts(*parts)
    # Exponents are integers of 32 bits, and far below any that were met where nothing was folded.
    height = np.clip(height / np.log(2), -(2.0**28), 2.0**28)
    c = np.ceil(height)
    sums = (sums * np.exp2(height - c)[..., None]).astype(kind)
    parts = parts._replace(
        c=np.where(empty, parts.c, c.astype(parts.c.dtype)),
        s=sums[..., :-1],
        z=sums[..., -1],
        lengths=lengths,
        rest=None,
    )
    result: AttentionState = rebuild(*parts)
    return result


def _sums(state: AttentionState) -> tuple[Array, Array, Array]:
    """Return c, S and z of a state in float64."""
    return state.c.astype(np.float64), state.S.astype(np.float64), state.z.astype(np.float64)


def _fraction(decay: Array, lengths: Array) -> Array:
    """By how much the next key is raised in a model's state, less an integer."""
    return np.asarray(lengths * -np.log(decay) % 1.0)


def _named(arrays: Mapping[str, npt.ArrayLike], name: str) -> Any:
    for key in (f"present_{name}", f"past_{name}"):
        if key in arrays:
            return arrays[key]
    raise ValueError(f"arrays must have present_{name}, got {', '.join(arrays) or 'none'}")


def _found(arrays: Mapping[str, npt.ArrayLike], name: str, axes: int) -> Array:
    array = validation.real_array(name, _named(arrays, name))
    if array.ndim != axes:
        raise ValueError(f"{name} must have {axes} axes, got shape {array.shape}")
    return array
