"""Linear-time attention (FAVOR+) on NumPy arrays, with Numba as the only engine.

>>> import numpy as np
>>> import favor_np
>>> fm = favor_np.feature_map("positive", dim=16, num_features=64)
>>> q, k, v = np.random.default_rng(0).standard_normal((3, 1000, 16))
>>> favor_np.favor_attention(q, k, v, fm, causal=True).shape
(1000, 16)

The names below are loaded when first used: ``import favor_np`` imports NumPy only.
"""

from __future__ import annotations

TYPE_CHECKING = False  # nothing is imported here: an interrupt would find no program yet

from favor_np._version import __version__

_HOMES = {
    "AttentionState": "state",
    "FeatureMap": "features",
    "WindowState": "window",
    "attention_weights": "weights",
    "diagnose": "diagnostics",
    "exact_attention": "exact",
    "exact_attention_vjp": "exact",
    "favor_attention": "attention",
    "favor_attention_vjp": "gradients",
    "feature_map": "features",
    "kernel_variance": "variance",
    "recommend": "recommendation",
    "sample_projection": "projection",
    "stream_attention": "streaming",
    "thread_limit": "cpu.threads",
}

__all__ = [
    "AttentionState",
    "FeatureMap",
    "WindowState",
    "__version__",
    "attention_weights",
    "diagnose",
    "exact_attention",
    "exact_attention_vjp",
    "favor_attention",
    "favor_attention_vjp",
    "feature_map",
    "kernel_variance",
    "recommend",
    "sample_projection",
    "stream_attention",
    "thread_limit",
]

if TYPE_CHECKING:
    from typing import Any

    from favor_np.attention import favor_attention as favor_attention
    from favor_np.cpu.threads import thread_limit as thread_limit
    from favor_np.diagnostics import diagnose as diagnose
    from favor_np.exact import exact_attention as exact_attention
    from favor_np.exact import exact_attention_vjp as exact_attention_vjp
    from favor_np.features import FeatureMap as FeatureMap
    from favor_np.features import feature_map as feature_map
    from favor_np.gradients import favor_attention_vjp as favor_attention_vjp
    from favor_np.projection import sample_projection as sample_projection
    from favor_np.recommendation import recommend as recommend
    from favor_np.state import AttentionState as AttentionState
    from favor_np.streaming import stream_attention as stream_attention
    from favor_np.variance import kernel_variance as kernel_variance
    from favor_np.weights import attention_weights as attention_weights
    from favor_np.window import WindowState as WindowState


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        value = getattr(importlib.import_module(f"favor_np.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'favor_np' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
