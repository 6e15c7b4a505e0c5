"""``favor-np export``: a trained model, or attention alone, as an ONNX model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from . import _options as options
from ._options import integer, real

if TYPE_CHECKING:
    import numpy as np

    from favor_np import nn

DESCRIPTION = """\
Write what favor-np train, or favor-np forecast --model performer --save, has saved, or attention
with a random feature map, as an ONNX model, for runtimes that know nothing of favor_np, and tell by
how much onnxruntime's result differs from favor_np's on random input. Needs onnx and onnxruntime.
"""

#: The input of the comparison: batch and positions, and how many of those come one at a time.
BATCH, POSITIONS, SINGLE = 2, 300, 20

#: What attention alone is made of, if nothing else is said.
ATTENTION: dict[str, Any] = {
    "map": "positive",
    "dim": 64,
    "features": 256,
    "heads": 4,
    "kv_heads": None,
    "value_dim": None,
    "bidirectional": False,
    "key_bias": False,
    "decay": None,
    "dtype": "float32",
}

Run: TypeAlias = "Callable[[dict[str, Any]], dict[str, Any]]"


@dataclass(frozen=True)
class Exported:
    """An ONNX model, and how it is compared with favor_np."""

    model: Any
    #: The result of the model's and of favor_np's calls.
    compared: Callable[[Run, np.random.Generator], tuple[Any, Any]]
    #: What the report says beside what all models have.
    facts: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    parser.usage = (
        "favor-np export CHECKPOINT OUT.onnx [options]\n"
        "       favor-np export --attention OUT.onnx [options]"
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="what was saved; the model")
    add("--key-mask", action="store_true", help="with an input that says which keys take part")
    add("--form", default="auto", choices=("auto", "chunk", "gated", "whole"), help="(auto)")
    add("--opset", type=integer(), default=17, metavar="N", help="version of operators (17)")
    add(
        "--seed",
        type=integer(0),
        default=0,
        metavar="N",
        help="of the random input, and of the feature map (0)",
    )
    add("--json", action="store_true", help="print JSON instead of text")
    group = parser.add_argument_group("attention alone")
    group.add_argument("--attention", action="store_true", help="with a random feature map")
    add = group.add_argument
    add("--map", choices=("positive", "relu", "elu"), help="kind (positive)")
    add("--dim", type=integer(), metavar="N", help="length of queries and keys (64)")
    add("--features", type=integer(), metavar="M", help="number of features (256)")
    add("--heads", type=integer(), metavar="N", help="heads of queries (4)")
    add("--kv-heads", type=integer(), metavar="N", help="heads of keys and values (as of queries)")
    add("--value-dim", type=integer(), metavar="N", help="length of values (as of keys)")
    add("--bidirectional", action="store_true", default=None, help="every query sees every key")
    add(
        "--key-bias",
        action="store_true",
        default=None,
        help="with an input that is added to the logits of keys",
    )
    add("--decay", type=real(positive=True), metavar="G", help="factor of earlier weights")
    add("--dtype", choices=("float16", "float32", "float64"), help="(float32)")


def run(args: argparse.Namespace) -> int:
    """Export, compare, print; return the exit status."""
    import favor_np.interop.onnx  # noqa: F401 whether there is onnx is known before any work

    checkpoint, out = _files(args)
    with options.output_file(out, checkpoint) as file, options.compilation_told():
        assert file is not None
        try:
            found = _attention(args) if checkpoint is None else _model(args, checkpoint)
        except ValueError as error:
            raise options.CommandError(str(error)) from None
        content = found.model.SerializeToString()
        difference, runtime = _difference(found, content, args.seed)
        file.write_bytes(content)
    facts = {x.key.removeprefix("favor_np."): x.value for x in found.model.metadata_props}
    report = {
        "file": out,
        "bytes": len(content),
        "form": facts["form"],
        "opset": args.opset,
        **found.facts,
        "inputs": _shapes(found.model.graph.input),
        "outputs": _shapes(found.model.graph.output),
        "runtime": runtime,
        "difference": difference,
    }
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0


def _files(args: argparse.Namespace) -> tuple[str | None, str]:
    """Return checkpoint, if there is one, and output; complete the options."""
    wanted = 1 if args.attention else 2
    if len(args.files) != wanted:
        files = "OUT.onnx" if args.attention else "CHECKPOINT and OUT.onnx, or --attention OUT.onnx"
        raise options.CommandError(f"wants {files}, got {' '.join(args.files)}")
    for name, default in ATTENTION.items():
        given = getattr(args, name) is not None
        if given and not args.attention:
            raise options.CommandError(f"--{name.replace('_', '-')} is for --attention only")
        if not given:
            setattr(args, name, default)
    return None if args.attention else args.files[0], args.files[-1]


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
        lines += (f"  {side[:-1]:<8}{n:<18}{' x '.join(map(str, shape))}" for n, shape in named)
    lines.append(
        f"{report['runtime']} differs from favor_np by {report['difference']:.1e} of the largest "
        f"number, on {BATCH} x {report['positions']} random positions"
    )
    return "\n".join(lines)


def _difference(found: Exported, content: bytes, seed: int) -> tuple[float, str]:
    """Compare onnxruntime with favor_np; the largest difference, relative, and the runtime."""
    import numpy as np

    try:
        import onnxruntime
    except ImportError:
        raise ImportError(
            "favor-np export needs onnxruntime: pip install 'favor_np[onnx]'", name="onnxruntime"
        ) from None
    runtime = f"onnxruntime {onnxruntime.__version__}"
    names = [x.name for x in found.model.graph.output]
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 its own classes, one for each kind of failure
        raise options.CommandError(f"{runtime} cannot load the model: {error}") from None

    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(names, session.run(None, inputs), strict=True))

    out, expected = found.compared(run, np.random.default_rng(seed))
    return float(abs(out - expected).max() / abs(expected).max()), runtime


# --- a trained model -----------------------------------------------------------------------------


def _model(args: argparse.Namespace, checkpoint: str) -> Exported:
    """Export a checkpoint."""
    import numpy as np

    from favor_np import nn
    from favor_np.forecast._performer import KIND
    from favor_np.interop.onnx import empty_state, export_model

    found = nn.load(checkpoint)
    if found.info.get("kind") == KIND:
        return _forecaster(args, found, checkpoint)
    exported = export_model(
        found.model, found.params, key_mask=args.key_mask, form=args.form, opset=args.opset
    )
    first, state = exported.graph.input[0], empty_state(exported, BATCH)
    positions = min(POSITIONS, _longest(found.model))
    prompt = max(positions - SINGLE, 1) if state else positions

    def compared(run: Run, rng: np.random.Generator) -> tuple[Any, Any]:
        shape = [x.dim_value for x in first.type.tensor_type.shape.dim][2:]
        x: Any = rng.standard_normal((BATCH, positions, *shape)).astype(np.float32)
        if first.name == "tokens":
            x = rng.integers(0, _vocabulary(found.model), (BATCH, positions))
        masks = {"key_mask": np.arange(positions) % 3 > 0} if args.key_mask else {}
        masks = {name: np.tile(mask, (BATCH, 1)) for name, mask in masks.items()}
        outs, now = [], state
        for at in (slice(0, prompt), *(slice(i, i + 1) for i in range(prompt, positions))):
            part = {name: mask[:, at] for name, mask in masks.items()}
            after = run({first.name: x[:, at], **part, **now})
            outs.append(after.pop(exported.graph.output[0].name))
            now = {name.replace("present", "past"): array for name, array in after.items()}
        x = x if first.name == "tokens" else x.astype(np.float64)
        mask = {"mask": masks["key_mask"]} if masks else {}
        expected = found.model.apply(nn.astype(found.params, np.float64), x, **mask)
        return np.concatenate(outs, axis=1), expected

    facts = {"model": repr(found.model), "step": found.step, "positions": positions}
    return Exported(exported, compared, facts)


def _longest(layer: nn.Layer) -> int:
    """How many positions a model takes at most; as many as are compared if there is no limit."""
    from favor_np import nn

    if isinstance(layer, nn.LearnedPositions):
        return layer.length
    return min(map(_longest, layer.parts.values()), default=POSITIONS)


def _vocabulary(layer: Any) -> int:
    """How many tokens the embedding knows that a model begins with."""
    while layer.parts:
        layer = next(iter(layer.parts.values()))
    return int(layer.count)


# --- a trained forecaster ------------------------------------------------------------------------


def _forecaster(args: argparse.Namespace, found: nn.Checkpoint, checkpoint: str) -> Exported:
    """Export a forecaster."""
    import numpy as np

    from favor_np import nn
    from favor_np.forecast import PerformerForecaster
    from favor_np.interop.onnx import export_model

    forecaster = PerformerForecaster._of(found, checkpoint)
    exported = export_model(
        forecaster,
        key_mask=args.key_mask,
        form=args.form,
        opset=args.opset,
    )

    def compared(run: Run, rng: np.random.Generator) -> tuple[Any, Any]:
        x = rng.choice(forecaster.recent_, (BATCH, POSITIONS)).astype(np.float32)
        columns = np.stack([forecaster.memory_.columns(rows.astype(np.float64)) for rows in x])
        output = forecaster.model_.apply(nn.astype(forecaster.params_, np.float64), columns)
        variance = np.exp(output[..., -len(forecaster.horizons) :])
        return run({"x": x})["variance"], variance

    facts = {"model": repr(forecaster), "positions": POSITIONS}
    return Exported(exported, compared, facts)


# --- attention alone -----------------------------------------------------------------------------


def _attention(args: argparse.Namespace) -> Exported:
    """Export attention with a random feature map."""
    import numpy as np

    from favor_np import favor_attention, feature_map
    from favor_np.interop.onnx import empty_state, export_attention

    fm = feature_map(args.map, args.dim, args.features, rng=args.seed)
    kv_heads = args.kv_heads or args.heads
    model = export_attention(
        fm,
        heads=args.heads,
        value_dim=args.value_dim or args.dim,
        kv_heads=kv_heads,
        causal=not args.bidirectional,
        key_mask=args.key_mask,
        key_bias=args.key_bias,
        decay=args.decay,
        form=args.form,
        opset=args.opset,
        dtype=args.dtype,
    )

    def compared(run: Run, rng: np.random.Generator) -> tuple[Any, Any]:
        widths = [x.type.tensor_type.shape.dim[2].dim_value for x in model.graph.input[:3]]
        q, k, v = (rng.standard_normal((BATCH, POSITIONS, n)).astype(args.dtype) for n in widths)
        inputs = {"q": q, "k": k, "v": v, **empty_state(model, BATCH)}
        options: dict[str, Any] = {"causal": not args.bidirectional, "decay": args.decay}
        if args.key_mask:
            inputs["key_mask"] = np.tile(np.arange(POSITIONS) % 3 > 0, (BATCH, 1))
            options["key_mask"] = inputs["key_mask"][:, None]
        if args.key_bias:
            bias = rng.standard_normal((BATCH, POSITIONS, kv_heads)).astype(args.dtype)
            inputs["key_bias"] = bias
            options["key_bias"] = bias.swapaxes(1, 2).astype(np.float64)

        def apart(x: Any, heads: int) -> Any:
            return x.reshape(BATCH, POSITIONS, heads, -1).swapaxes(1, 2).astype(np.float64)

        expected = favor_attention(
            apart(q, args.heads),
            apart(k, kv_heads),
            apart(v, kv_heads),
            fm,
            enable_gqa=True,
            **options,
        )
        return apart(run(inputs)["out"], args.heads), expected

    return Exported(model, compared, {"fingerprint": fm.fingerprint, "positions": POSITIONS})
