"""``favor-np export``: attention as an ONNX model, compared with favor_np as it is written."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from . import _options as options
from ._options import integer, real

if TYPE_CHECKING:
    from favor_np import FeatureMap

DESCRIPTION = """\
Write attention with a random feature map as an ONNX model, for runtimes that know nothing of
favor_np, and tell by how much onnxruntime's result differs from favor_np's on random input.
Needs onnx and onnxruntime.
"""

#: The input of the comparison: batch and positions.
BATCH, POSITIONS = 2, 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("out", metavar="OUT.onnx", help="the model")
    add("--attention", action="store_true", required=True, help="export attention alone")
    add("--map", default="positive", choices=("positive", "relu", "elu"), help="kind (positive)")
    add("--dim", type=integer(), default=64, metavar="N", help="length of queries and keys (64)")
    add("--features", type=integer(), default=256, metavar="M", help="number of features (256)")
    add("--seed", type=integer(0), default=0, metavar="N", help="of the feature map (0)")
    add("--heads", type=integer(), default=4, metavar="N", help="heads of queries (4)")
    add("--kv-heads", type=integer(), metavar="N", help="heads of keys and values (as of queries)")
    add("--value-dim", type=integer(), metavar="N", help="length of values (as of keys)")
    add("--bidirectional", action="store_true", help="every query sees every key")
    add("--key-mask", action="store_true", help="with an input that says which keys take part")
    add("--decay", type=real(positive=True), metavar="G", help="factor of earlier weights")
    add("--form", default="auto", choices=("auto", "chunk", "gated", "whole"), help="(auto)")
    add("--opset", type=integer(), default=17, metavar="N", help="version of operators (17)")
    add("--dtype", default="float32", choices=("float16", "float32", "float64"), help="(float32)")
    add("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Export, compare, print; return the exit status."""
    from favor_np import feature_map
    from favor_np.interop.onnx import export_attention

    with options.output_file(args.out) as file, options.compilation_told():
        assert file is not None
        try:
            fm = feature_map(args.map, args.dim, args.features, rng=args.seed)
            model = export_attention(
                fm,
                heads=args.heads,
                value_dim=args.value_dim or args.dim,
                kv_heads=args.kv_heads,
                causal=not args.bidirectional,
                key_mask=args.key_mask,
                decay=args.decay,
                form=args.form,
                opset=args.opset,
                dtype=args.dtype,
            )
        except ValueError as error:
            raise options.CommandError(str(error)) from None
        content = model.SerializeToString()
        difference, runtime = _difference(model, content, fm, args)
        file.write_bytes(content)
    facts = {x.key.removeprefix("favor_np."): x.value for x in model.metadata_props}
    report = {
        "file": args.out,
        "bytes": len(content),
        "form": facts["form"],
        "opset": args.opset,
        "fingerprint": facts["fingerprint"],
        "inputs": _shapes(model.graph.input),
        "outputs": _shapes(model.graph.output),
        "runtime": runtime,
        "difference": difference,
    }
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0


def _shapes(values: Any) -> dict[str, list[str | int]]:
    """Shapes by name."""
    return {
        x.name: [n.dim_param or n.dim_value for n in x.type.tensor_type.shape.dim] for x in values
    }


def _text(report: dict[str, Any]) -> str:
    lines = [
        f"Wrote {report['file']}: {report['bytes']:,} bytes, form {report['form']!r}, "
        f"opset {report['opset']}"
    ]
    for side in ("inputs", "outputs"):
        named = report[side].items()
        lines += (f"  {side[:-1]:<8}{n:<16}{' x '.join(map(str, shape))}" for n, shape in named)
    lines.append(
        f"{report['runtime']} differs from favor_np by {report['difference']:.1e} of the largest "
        f"number, on {BATCH} x {POSITIONS} random positions"
    )
    return "\n".join(lines)


def _difference(
    model: Any, content: bytes, fm: FeatureMap, args: argparse.Namespace
) -> tuple[float, str]:
    """Compare onnxruntime with favor_np; the largest difference, relative, and the runtime."""
    import numpy as np

    from favor_np import AttentionState, favor_attention
    from favor_np.interop.onnx import to_onnx_state

    try:
        import onnxruntime
    except ImportError:
        raise ImportError(
            "favor-np export needs onnxruntime: pip install 'favor_np[onnx]'", name="onnxruntime"
        ) from None
    runtime = f"onnxruntime {onnxruntime.__version__}"
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 its own classes, one for each kind of failure
        raise options.CommandError(f"{runtime} cannot load the model: {error}") from None
    rng = np.random.default_rng(args.seed)
    widths = {x.name: x.type.tensor_type.shape.dim[2].dim_value for x in model.graph.input[:3]}
    arrays = {
        n: rng.standard_normal((BATCH, POSITIONS, width)).astype(args.dtype)
        for n, width in widths.items()
    }
    kv_heads = args.kv_heads or args.heads
    heads = {"q": args.heads, "k": kv_heads, "v": kv_heads}
    mask = np.arange(POSITIONS) % 3 > 0 if args.key_mask else None
    q, k, v = (
        arrays[n].reshape(BATCH, POSITIONS, heads[n], -1).swapaxes(1, 2).astype(np.float64)
        for n in "qkv"
    )
    expected = favor_attention(
        q,
        k,
        v,
        fm,
        causal=not args.bidirectional,
        enable_gqa=True,
        decay=args.decay,
        key_mask=mask,
    )
    state = AttentionState.zeros(
        fm,
        v.shape[-1],
        (BATCH, kv_heads),
        decay=args.decay,
        dtype="float64" if args.dtype == "float64" else "float32",
    )
    inputs = {**arrays, **to_onnx_state(state)}
    if mask is not None:
        inputs["key_mask"] = np.tile(mask, (BATCH, 1))
    out = session.run(["out"], inputs)[0].reshape(BATCH, POSITIONS, args.heads, -1).swapaxes(1, 2)
    return float(abs(out - expected).max() / abs(expected).max()), runtime
