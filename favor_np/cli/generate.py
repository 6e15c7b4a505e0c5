"""``favor-np generate``: text from a checkpoint of ``favor-np train``."""

from __future__ import annotations

import argparse
import json
import os

from . import _options as options
from ._options import integer, real

DESCRIPTION = """\
Continue a text, byte by byte, with a model that favor-np train has saved. Every byte costs the
same, however long the text is.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a file that favor-np train has written")
    add("--prompt", default="The ", metavar="TEXT", help="what to continue ('The ')")
    add("--length", type=integer(), default=500, metavar="N", help="bytes to add (500)")
    add(
        "--temperature",
        type=real(),
        default=0.8,
        metavar="T",
        help="0 takes the most likely byte, 1 draws as often as the model says (0.8)",
    )
    add("--top-k", type=integer(), default=None, metavar="N", help="draw among so many bytes (all)")
    add("--seed", type=integer(0), default=0, metavar="N", help="seed (0)")
    add("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Generate, print; return the exit status."""
    from favor_np import nn

    if not args.prompt:
        raise options.CommandError("--prompt must not be empty")
    try:
        found = nn.load(args.checkpoint)
    except ValueError as error:
        raise options.CommandError(str(error)) from None
    model = found.model
    if not isinstance(model, nn.PerformerLM) or model.vocab != 256 or not model.causal:
        raise options.CommandError(f"{args.checkpoint}: holds no language model of bytes")
    prompt = os.fsencode(args.prompt)  # bytes, as the shell has given them
    choice = {"temperature": args.temperature, "top_k": args.top_k, "seed": args.seed}
    try:
        with options.compilation_told():
            new = bytes(model.generate(found.params, prompt, args.length, **choice))
    except (TypeError, ValueError) as error:  # arrays that do not fit the model
        raise options.CommandError(f"{args.checkpoint}: {error}") from None
    if args.json:
        before, text = (x.decode(errors="replace") for x in (prompt, new))
        print(json.dumps({"prompt": before, "text": text, "step": found.step}, indent=2))
    else:
        print((prompt + new).decode(errors="replace"))
    return 0
