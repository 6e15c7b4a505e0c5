"""``favor-np train``: a language model of bytes, trained here."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _options as options
from ._options import integer, real, share

if TYPE_CHECKING:
    from favor_np import nn

DESCRIPTION = """\
Train a language model of bytes on a text, and say how many bits a byte it needs for a tenth of
its paragraphs, which it has not seen: beside counts of five bytes, xz, and the same weights with
exact attention. Ctrl-C saves and ends; --resume with the same options goes on, with the same bits.
"""

#: Options that decide the bits of a run: it cannot go on with others.
DECISIVE = (
    "dim",
    "depth",
    "heads",
    "features",
    "layers",
    "exact",
    "local_heads",
    "window",
    "decay",
    "length",
    "batch",
    "rate",
    "dropout",
    "seed",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("text", nargs="?", metavar="TEXT", help="a file of text (default: Python's documentation)")
    add("--out", default="model.safetensors", metavar="FILE", help="checkpoint (model.safetensors)")
    add("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    add("--steps", type=integer(), default=600, metavar="N", help="steps in all (600)")
    add("--dim", type=integer(), default=256, metavar="N", help="length of a row (256)")
    add("--depth", type=integer(), default=4, metavar="N", help="blocks (4)")
    add("--heads", type=integer(), default=4, metavar="N", help="heads (4)")
    add(
        "--features",
        type=integer(2, even=True),
        default=128,
        metavar="N",
        help="random features (128)",
    )
    add(
        "--layers",
        default="F",
        metavar="FE",
        help="blocks with random features (F) and with exact attention (E), repeated: FFFE (F)",
    )
    add("--exact", action="store_true", help="exact attention everywhere")
    add(
        "--local-heads",
        type=integer(0),
        default=None,
        metavar="N",
        help="heads of F blocks, the "
        "last ones, that attend exactly, within a window (half of them)",
    )
    add("--window", type=integer(), default=128, metavar="N", help="bytes of it (128)")
    add(
        "--decay",
        type=_factors,
        default=None,
        metavar="A,B",
        help="what the weight of a byte is "
        "multiplied with at each later one, for each head of F blocks that is not local (1)",
    )
    add("--length", type=integer(), default=512, metavar="N", help="bytes of a window (512)")
    add("--batch", type=integer(), default=4, metavar="N", help="windows of a step (4)")
    add("--rate", type=real(positive=True), default=2e-3, metavar="R", help="highest rate (0.002)")
    add("--dropout", type=share, default=0.1, metavar="P", help="share dropped (0.1)")
    add("--every", type=integer(), default=100, metavar="N", help="steps between looks (100)")
    add("--seed", type=integer(0), default=0, metavar="N", help="seed (0)")
    add("--threads", type=integer(), default=None, metavar="N", help="threads")
    add("--no-baselines", action="store_true", help="without counts of bytes and xz")
    add("--json", action="store_true", help="print JSON instead of text")
    add("--plot", metavar="OUT.png", help="draw the loss (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Train, report; return the exit status."""
    picture = options.picture_format(args.plot)
    options.checkpoint_path(args.out, args.text)
    if args.local_heads is None:
        args.local_heads = args.heads // 2
    with options.output_file(args.plot, args.text, args.out) as figure:
        facts, history = _train(args)
        if figure is not None:
            history.plot().savefig(figure, format=picture)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print("\n".join(_report(args, facts)))
    return 0


def _factors(text: str) -> list[float]:
    """Convert numbers with commas between them."""
    return list(map(real(positive=True), text.split(",")))


def _text(path: str | None) -> str:
    from favor_np.nn import data

    if path is None:
        return data.python_docs()
    return Path(path).read_text(encoding="utf-8", errors="surrogateescape")


def _train(args: argparse.Namespace) -> tuple[dict[str, Any], nn.History]:
    """Train as the options say; return what there is to report."""
    import numpy as np

    import favor_np
    from favor_np import nn
    from favor_np.cpu.threads import resolve_threads
    from favor_np.nn import data

    learned, held_out = data.split(_text(args.text))
    if len(learned) <= args.length or len(held_out) < 2:
        raise options.CommandError(
            f"{args.text}: too short: {len(learned)} bytes to learn from, {len(held_out)} held "
            "out, without paragraphs, or lines, that are repeated"
        )
    text = np.frombuffer(held_out, np.uint8)
    validation = data.in_order(text, args.length, args.batch)
    rate = nn.cosine(args.rate, steps=args.steps, warmup=min(100, max(args.steps // 4, 1)))
    settings = {name: getattr(args, name) for name in DECISIVE}
    settings |= {"text": hashlib.sha256(learned).hexdigest(), "steps": args.steps}
    try:
        model, params, optimizer, start, best = _begin(args, settings)
    except ValueError as error:
        raise options.CommandError(str(error)) from None
    if start >= args.steps:
        raise options.CommandError(
            f"{args.out}: has {start} steps already, and --steps asks for {args.steps}"
        )
    batches = data.windows(learned, args.length, args.batch, seed=args.seed)
    with favor_np.thread_limit(resolve_threads(args.threads)), options.compilation_told():
        history = nn.train(
            model,
            params,
            batches,
            steps=args.steps,
            rate=rate,
            optimizer=optimizer,
            start=start,
            best=best,
            seed=args.seed,
            redraw=None if args.exact else 1000,
            validation_batches=validation,
            every=args.every,
            path=args.out,
            info=settings,
        )
        exact = model.replace(exact=True)
        cost = [nn.cross_entropy(exact.apply(params, x), y)[0] for x, y in validation]
    facts = {
        "bytes": len(learned),
        "held_out": len(held_out),
        "parameters": int(optimizer.vector.size),
        "steps": history.step,
        "stopped": history.stopped,
        "seconds": round(history.seconds, 1),
        "tokens_per_second": round(history.tokens / history.seconds, 1),
        "bits_per_byte": history.validation[-1][1] / math.log(2),
        "with_exact_attention": float(np.mean(cost)) / math.log(2),
        "checkpoint": str(args.out),
    }
    if not args.no_baselines:
        facts["five_grams"] = data.ngram_bits(learned, held_out)
        facts["xz"] = data.xz_bits(learned, held_out)
    return facts, history


def _begin(
    args: argparse.Namespace, settings: dict[str, Any]
) -> tuple[Any, Any, nn.AdamW, int, Any]:
    """Return model, parameters, optimiser, first step and best look: new, or the checkpoint's."""
    import numpy as np

    from favor_np import nn

    if args.resume and Path(args.out).exists():
        found = nn.load(args.out)
        if not isinstance(found.model, nn.PerformerLM) or found.optimizer is None:
            raise ValueError(f"{args.out} is no checkpoint of favor-np train")
        _compare(args.out, settings, found.info)
        return found.model, found.params, found.optimizer, found.step, found.info.get("best")
    model = nn.PerformerLM(
        vocab=256,
        dim=args.dim,
        depth=args.depth,
        heads=args.heads,
        num_features=args.features,
        layers=args.layers,
        exact=args.exact,
        dropout=args.dropout,
        window=args.window,
        local_heads=args.local_heads,
        decay=None if args.decay is None else tuple(args.decay),
    )
    params = model.init(np.random.default_rng(args.seed))
    return model, params, nn.AdamW(params), 0, None


def _compare(out: str, settings: dict[str, Any], before: dict[str, Any]) -> None:
    """Refuse to go on with settings that a checkpoint was not trained with; tell of other steps."""
    wrong = [
        f"--{name.replace('_', '-')} {before.get(name)}, not {settings[name]}"
        for name in DECISIVE
        if before.get(name) != settings[name]
    ]
    if before.get("text") != settings["text"]:
        wrong.append("another text")
    if wrong:
        raise ValueError(f"{out} was trained with {'; '.join(wrong)}")
    if before["steps"] != settings["steps"]:
        print(
            f"favor-np: {out} was to have {before['steps']} steps; with {settings['steps']} "
            "the rate falls otherwise",
            file=sys.stderr,
        )


def _report(args: argparse.Namespace, facts: dict[str, Any]) -> list[str]:
    ended = "" if facts["stopped"] == "finished" else f" ({facts['stopped']})"
    lines = [
        f"{facts['parameters']:,} parameters, {facts['bytes']:,} bytes to learn from, "
        f"{facts['held_out']:,} held out",
        f"{facts['steps']:,} steps{ended} in {facts['seconds']:,.0f} s, "
        f"{facts['tokens_per_second']:,.0f} bytes a second",
        "",
        "Bits a byte on the part held out",
        f"  this model                     {facts['bits_per_byte']:.3f}",
        f"  the same with exact attention  {facts['with_exact_attention']:.3f}",
    ]
    if "xz" in facts:
        lines += [
            f"  counts of five bytes           {facts['five_grams']:.3f}",
            f"  xz after the rest              {facts['xz']:.3f}",
        ]
    lines += ["", f"Wrote {args.out}; try: favor-np generate {args.out} --prompt 'The '"]
    return lines + ([f"Wrote {args.plot}"] if args.plot else [])
