"""Trained models as ONNX models: those of `favor_np.nn`, and forecasters made of them."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from favor_np import nn, validation
from favor_np.forecast import HAR, PerformerForecaster
from favor_np.interop.onnx import forecasters, forms
from favor_np.interop.onnx.graph import Graph
from favor_np.interop.onnx.layers import Writer
from favor_np.nn.layer import Layer
from favor_np.nn.tree import Params

Array: TypeAlias = npt.NDArray[Any]

#: Bytes that a model in one file can have.
LARGEST = 2**31 - 2**20


def export_model(
    model: nn.Layer | PerformerForecaster | HAR,
    params: Params | None = None,
    *,
    key_mask: bool = False,
    form: str = "auto",
    opset: int = 17,
    dtype: npt.DTypeLike | None = None,
    coverage: float = 0.9,
) -> onnx.ModelProto:
    """Return a trained model as an ONNX model: an encoder, a language model, a forecaster.

    Batch and number of positions are free.  A causal model of `favor_np.nn` takes and returns what
    it knows of the positions before, so that a text can be continued token by token.  A forecaster
    takes the last returns, and returns volatilities.

    Parameters
    ----------
    model : favor_np.nn.Layer, PerformerForecaster or HAR
        Made of classes of `favor_np.nn`, or a fitted forecaster of `favor_np.forecast`.
    params : dict, optional
        The parameters of a layer, in float32 or float64.  A forecaster has its own.
    key_mask : bool, default False
        Whether there is an input that says which positions attention may see; for
        `favor_np.nn.Performer` and `favor_np.nn.PerformerLM`, as ``mask`` is.
    form : {"auto", "chunk", "gated", "whole"}, default "auto"
        How attention with random features is written: see `export_attention`.
    opset : int, default 17
        Version of the standard operators, from 14 to 27.
    dtype : {float32, float64}, optional
        In which the ONNX model computes; default that of the parameters.
    coverage : float, default 0.9
        Share of outcomes that intervals of a `PerformerForecaster` should hold.

    Returns
    -------
    onnx.ModelProto
        Checked by onnx.  Inputs are

        - ``tokens`` (batch, positions) of int64, if the model begins with an embedding, or ``x``
          (batch, positions, dim);
        - ``key_mask`` (batch, positions) of bool, if asked for;
        - of a causal model, names that begin with ``past_``: `empty_state` returns what a text
          begins with.

        Outputs are ``logits`` (batch, positions, vocab) of a `favor_np.nn.PerformerLM`, else
        ``out`` (batch, positions, dim), and of a causal model names that begin with ``present_``,
        which the next call takes as ``past_``.

        A forecaster takes ``x`` (batch, positions, columns): the rows of `predict`, the newest one
        last.  Outputs are (batch, positions, horizons): first what `predict` returns,
        ``variance``, or for ``target="return"`` ``mean`` and then ``variance``; ``volatility``,
        the root of the variance; and of a `PerformerForecaster` ``interval``, what
        `predict_interval` returns, with a last axis of lower and upper ends.

    Raises
    ------
    ImportError
        By ``import favor_np.interop.onnx``, if onnx is not installed.
    TypeError
        If `model` is neither a layer nor a forecaster that can be exported, parameters are missing
        or have several dtypes, or a forecaster is given some.
    ValueError
        If a layer, or an option of one, cannot be exported; it is named.  If a forecaster is not
        fitted.

    See Also
    --------
    export_attention : Attention alone.
    empty_state : The state before the first token.

    Notes
    -----
    Dropout is left out.  Layers with exact attention keep all keys and values, as ``past_keys_0``
    and ``past_values_0`` (batch, kv_heads, past_positions, d) for layer 0, and with `key_mask`
    there is a ``past_mask`` (batch, past_positions).  Heads within a window keep
    ``past_near_keys_0``, ``past_near_values_0`` and ``past_near_mask_0`` of window - 1 positions.
    ``past_state_0`` and ``past_max_0`` are those of `export_attention`, ``past_row_0`` is what
    `favor_np.nn.ShiftTokens` shifts to the next row, and ``past_length`` (batch) how many tokens
    there were.

    Tokens are not checked: runtimes differ in what they do with those that there are not.

    Examples
    --------
    >>> import numpy as np
    >>> import onnxruntime
    >>> from favor_np import nn
    >>> from favor_np.interop.onnx import empty_state, export_model
    >>> model = nn.PerformerLM(vocab=256, dim=16, depth=2, heads=2, num_features=16)
    >>> params = model.init(np.random.default_rng(0))
    >>> exported = export_model(model, params)
    >>> session = onnxruntime.InferenceSession(exported.SerializeToString())
    >>> names = [output.name for output in session.get_outputs()]
    >>> def run(tokens, state):
    ...     found = dict(zip(names, session.run(None, {"tokens": tokens, **state})))
    ...     return found.pop("logits"), {n.replace("present", "past"): x for n, x in found.items()}
    >>> text = np.array([list(b"to be or not")])
    >>> logits, state = run(text, empty_state(exported))
    >>> bool(abs(logits - model.apply(params, text)).max() < 1e-5)
    True
    >>> token, state = run(logits[:, -1:].argmax(-1), state)  # the next one
    >>> token.shape
    (1, 1, 256)

    The last row of a forecaster's output is the forecast of what is to come:

    >>> from favor_np.forecast import PerformerForecaster, inputs, read_prices
    >>> rows = inputs(read_prices())
    >>> forecaster = PerformerForecaster(epochs=0).fit(rows)
    >>> exported = export_model(forecaster)
    >>> session = onnxruntime.InferenceSession(exported.SerializeToString())
    >>> last = rows[-2500:].astype(np.float32)[None]
    >>> variance, volatility, interval = session.run(None, {"x": last})
    >>> bool(abs(variance[0, -1] / forecaster.predict()[-1] - 1) < 3e-6)
    True
    """
    masked = validation.flag("key_mask", key_mask)
    if masked and not isinstance(model, nn.Performer):
        raise ValueError(f"key_mask is for a Performer or PerformerLM, got {type(model).__name__}")
    goes_on = False
    if isinstance(model, Layer):
        if params is None:
            raise TypeError(f"params must be those of the {type(model).__name__}, got None")
        causal = goes_on = _causal(model)
    else:
        forecasters.check(model, coverage)
        if params is not None:
            raise TypeError("params must be None: a forecaster has its own")
        params, causal = getattr(model, "params_", {}), True
    real = _dtype(params, dtype)
    form = forms.form_of(form, real, causal=causal)
    writer = Writer(
        Graph(validation.integer("opset", opset), real), form, goes_on=goes_on, masked=masked
    )
    inputs, outputs = writer.ends
    if isinstance(model, Layer):
        y = writer.write(model, nn.astype(params, real), writer.input(model))
        name = "logits" if isinstance(model, nn.PerformerLM) else "out"
        writer.output(name, writer.g.Identity(y.name), "batch", "positions", y.width)
        outputs.insert(0, outputs.pop())
    else:
        forecasters.write(writer, model, coverage)
    facts = {
        "form": form,
        "model": repr(model),
        "causal": causal,
        "fingerprints": writer.fingerprints,
    }
    return writer.g.model("favor_np", inputs, outputs, facts)


def empty_state(model: onnx.ModelProto, batch: int = 1) -> dict[str, Array]:
    """Return the state before the first token, for an exported model.

    Parameters
    ----------
    model : onnx.ModelProto
        What `export_model` or `export_attention` returned.
    batch : int, default 1
        How many sequences there are.

    Returns
    -------
    dict of str to ndarray
        All inputs whose names begin with ``past_``: -1e30 in ``past_max``, zeros elsewhere, and no
        positions.

    Raises
    ------
    TypeError
        If `model` is no ModelProto, or `batch` no integer.

    Examples
    --------
    >>> import favor_np
    >>> from favor_np.interop.onnx import empty_state, export_attention
    >>> fm = favor_np.feature_map("positive", dim=8, num_features=64)
    >>> state = empty_state(export_attention(fm, heads=2, value_dim=4), batch=3)
    >>> {name: x.shape for name, x in state.items()}
    {'past_state': (3, 2, 64, 5), 'past_max': (3, 2, 64)}
    """
    if not isinstance(model, onnx.ModelProto):
        raise TypeError(f"model must be an onnx.ModelProto, got {validation.got(model)}")
    free = {"batch": validation.integer("batch", batch), "past_positions": 0}
    state = {}
    for x in model.graph.input:
        if x.name.startswith("past_"):
            kind = x.type.tensor_type
            shape = [free.get(n.dim_param, n.dim_value) for n in kind.shape.dim]
            fill = forms.NOTHING if x.name.startswith("past_max") else 0
            state[x.name] = np.full(shape, fill, helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return state


def _dtype(params: Params, wanted: npt.DTypeLike | None) -> np.dtype[Any]:
    """Return what is wanted, or the dtype that all parameters have; float32 if there are none."""
    known = np.dtype(np.float32), np.dtype(np.float64)
    kinds = {x.dtype for _, x in nn.leaves(params)} or {known[0]}
    if len(kinds) > 1 or not kinds.issubset(known):
        names = ", ".join(sorted(map(str, kinds)))
        raise TypeError(f"params must all be float32, or all float64, got {names}")
    real = kinds.pop() if wanted is None else validation.float_dtype("dtype", wanted)
    size = sum(x.size for _, x in nn.leaves(params)) * real.itemsize
    if size > LARGEST:
        raise ValueError(f"params must have less than {LARGEST:,} bytes, got {size:,}")
    return real


def _causal(layer: Layer) -> bool:
    """Whether no row depends on later ones."""
    if isinstance(layer, (nn.FavorSelfAttention, nn.ShiftTokens)) and not layer.causal:
        return False
    return all(map(_causal, layer.parts.values()))
