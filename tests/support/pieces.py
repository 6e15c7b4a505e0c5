"""Gradients that flow through states: those of a sequence in pieces are those of the whole."""

import numpy as np

from favor_np import FeatureMap, favor_attention_vjp
from support.inputs import draw, random_inputs

NAMES = "q", "k", "v", "projection"
#: What a call with a state may have besides.
STATES = {
    "plain": {},
    "decay": {"decay": np.array([0.9, 0.7, 1.0])},
    "grouped": {"enable_gqa": True},
    "grouped, decay": {"enable_gqa": True, "decay": 0.95},
    "packed": {"cu_seqlens": [0, 10, 10, 40, 70]},
    "packed, decay": {"cu_seqlens": [0, 10, 10, 40, 70], "decay": 0.97},
}


def gradients(q, k, v, fm, grad, **options):
    """Those of q, k, v and the projection."""
    grads = favor_attention_vjp(q, k, v, fm, **options)[1](grad)
    return tuple(getattr(grads, name) for name in NAMES)


def in_pieces(cuts, more, dtype, **options):
    """Gradients by pullbacks of pieces, chained from the last to the first, and those of the whole."""
    lead = (6 if "enable_gqa" in more else 3,)
    q, _, _, g = random_inputs(70, 6, 5, lead, cotangent=True, dtype=dtype)
    _, k, v = random_inputs(70, 6, 5, (3,), seed=1, dtype=dtype)
    k *= np.linspace(0.5, 2.5, 70, dtype=dtype)[:, None]
    fm = FeatureMap.from_projection(draw(7, 6, dtype=dtype), antithetic=True)
    mask = np.random.default_rng(0).random((3, 70)) < 0.8
    options = {"causal": True, **more, **options}
    whole = gradients(q, k, v, fm, g, key_mask=mask, **options)
    state, pieces = None, []
    for start, stop in zip([0, *cuts], [*cuts, 70], strict=True):
        rows = slice(start, stop)
        (_, state), pullback = favor_attention_vjp(
            q[:, rows], k[:, rows], v[:, rows], fm, key_mask=mask[:, rows],
            state=state, return_state=True, **options,
        )  # fmt: skip
        pieces.append((pullback, g[:, rows]))
    found, grad_state = [], None
    for pullback, grad in pieces[::-1]:
        grads = pullback(grad, grad_state)
        grad_state = grads.state
        found.insert(0, tuple(getattr(grads, name) for name in NAMES))
    assert grad_state is None  # of the first piece, which began with nothing
    *rows, projections = zip(*found, strict=True)
    return (*(np.concatenate(x, axis=-2) for x in rows), sum(projections)), whole
