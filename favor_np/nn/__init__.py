"""Models that learn: layers with exact gradients, losses, an optimiser, on NumPy arrays alone.

A layer is a frozen dataclass of sizes. ``init`` makes its parameters, a nested dictionary of
arrays; ``vjp`` computes and returns a pullback, which adds the gradients of parameters into a tree
like theirs. ``key=None`` evaluates, a key trains: whatever is random is a function of it.
"""

from favor_np.nn.attention import FavorSelfAttention
from favor_np.nn.checkpoint import Checkpoint, load, save
from favor_np.nn.data import windows
from favor_np.nn.feedforward import FeedForward
from favor_np.nn.layer import Chain, Layer, Sum
from favor_np.nn.linear import Dropout, Embedding, Linear
from favor_np.nn.losses import cross_entropy, gaussian, mean_squared, qlike, quantile
from favor_np.nn.models import Block, Performer, PerformerLM, Residual
from favor_np.nn.norms import LayerNorm, RMSNorm, ScaleNorm, UnitScale
from favor_np.nn.optim import AdamW, constant, cosine, warmup_stable_decay
from favor_np.nn.position import LearnedPositions, Rotary, ShiftTokens, SinusoidalPositions
from favor_np.nn.training import History, diagnose_attention, train
from favor_np.nn.tree import astype, leaves, zeros_like

__all__ = [
    "AdamW",
    "Block",
    "Chain",
    "Checkpoint",
    "Dropout",
    "Embedding",
    "FavorSelfAttention",
    "FeedForward",
    "History",
    "Layer",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "Performer",
    "PerformerLM",
    "RMSNorm",
    "Residual",
    "Rotary",
    "ScaleNorm",
    "ShiftTokens",
    "SinusoidalPositions",
    "Sum",
    "UnitScale",
    "astype",
    "constant",
    "cosine",
    "cross_entropy",
    "diagnose_attention",
    "gaussian",
    "leaves",
    "load",
    "mean_squared",
    "qlike",
    "quantile",
    "save",
    "train",
    "warmup_stable_decay",
    "windows",
    "zeros_like",
]
