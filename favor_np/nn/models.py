"""Whole models: blocks of attention and feed-forward layers, an encoder, a language model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from favor_np import validation
from favor_np.nn.attention import FavorSelfAttention
from favor_np.nn.blas import one_thread
from favor_np.nn.feedforward import FeedForward
from favor_np.nn.layer import (
    Chain,
    InOrder,
    Key,
    Layer,
    Pullback,
    Step,
    cotangent,
    extend_part,
    leaf,
    part,
    prepare_parts,
)
from favor_np.nn.linear import Dropout, Embedding, Linear
from favor_np.nn.memory import empty_like
from favor_np.nn.norms import LayerNorm, RMSNorm, ScaleNorm
from favor_np.nn.position import LearnedPositions, ShiftTokens, SinusoidalPositions
from favor_np.nn.products import add_product, multiply, multiply_back, multiply_few
from favor_np.nn.tree import Array, Params

NORMS = {"layer": LayerNorm, "rms": RMSNorm, "scale": ScaleNorm}


@dataclass(frozen=True)
class Residual(Layer):
    """``y = x + branch(norm(x))``, and what may stand between.

    Parameters
    ----------
    branch : Layer
        From rows to rows of the same length.
    norm : Layer, optional
        What comes before it.
    shift : ShiftTokens, optional
        What comes between them.
    dropout : float, default 0
        Share of what the branch returns that is dropped in training.
    gate : bool, default False
        Multiply what the branch returns with a learned number that begins near zero
        (ReZero, Bachlechner et al. 2020, arXiv:2003.04887).

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> layer = nn.Residual(nn.Linear(8, 8), nn.RMSNorm(8))
    >>> layer.apply(layer.init(np.random.default_rng(0)), np.ones((2, 8))).shape
    (2, 8)
    """

    branch: Layer
    norm: Layer | None = None
    shift: ShiftTokens | None = None
    dropout: float = 0.0
    gate: bool = False

    @cached_property
    def parts(self) -> dict[str, Layer]:
        parts = {"norm": self.norm, "shift": self.shift, "branch": self.branch}
        parts["dropout"] = Dropout(self.dropout) if self.dropout else None
        return {name: layer for name, layer in parts.items() if layer is not None}

    @cached_property
    def _shifts_in_norm(self) -> bool:
        """Whether one pass over memory does both."""
        shift = self.shift is not None and self.shift.causal
        return shift and isinstance(self.norm, (LayerNorm, RMSNorm)) and self.norm.dim % 2 == 0

    def init(self, rng: np.random.Generator) -> Params:
        params = super().init(rng)
        if self.gate:
            params["gate"] = np.full(1, 1e-3, np.float32)
        return params

    def vjp(
        self, params: Params, x: Any, *, key: Key | None = None, **options: Any
    ) -> tuple[Array, Pullback]:
        pulls, out = [], x
        fused = self._shifts_in_norm
        for name, layer in self.parts.items():
            if fused and name == "shift":
                continue
            more: dict[str, Any] = {"shifted": True} if fused and name == "norm" else {}
            if name == "branch":
                more = options
            out, pull = part(layer, name, params, out, key, **more)
            pulls.append(pull)
        gate = leaf(params, "gate", (1,)) if self.gate else None
        branch = out

        def pullback(grad: Array, grads: Params) -> Array:
            back = grad
            if gate is not None:
                grad = cotangent(grad, branch.shape, branch.dtype)
                grads["gate"] += np.vdot(grad, branch)
                back = grad * gate
            for pull in reversed(pulls):
                back = pull(back, grads)
            return np.add(grad, back, out=empty_like(grad))

        scaled = branch if gate is None else branch * gate
        return np.add(x, scaled, out=empty_like(scaled)), pullback

    def extend(self, params: Params, state: dict[str, Any], x: Any) -> Array:
        out = x
        for name, layer in self.parts.items():
            out = extend_part(layer, name, params, state, out)
        if self.gate:
            out = out * leaf(params, "gate", (1,))
        y: Array = x + out
        return y

    def prepare(self, params: Params) -> Step:
        branch = prepare_parts(self.parts, params)
        if not self.gate:
            return lambda state, x: x + branch(state, x)
        gate = leaf(params, "gate", (1,))
        return lambda state, x: x + branch(state, x) * gate


@dataclass(frozen=True)
class Block(InOrder):
    """Attention, then a feed-forward layer, each added to its input.

    Parameters
    ----------
    attention : FavorSelfAttention
        The first.
    feedforward : FeedForward
        The second.
    norm : {"rms", "layer", "scale", None}, default "rms"
        What either's input goes through.
    shift : bool, default False
        Whether `ShiftTokens` comes after it.
    dropout : float, default 0
        Share of either's output that is dropped in training.
    gate : bool, default False
        Whether either's output is multiplied with a learned number that begins near zero.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> layer = nn.Block(nn.FavorSelfAttention(16, 2), nn.FeedForward(16))
    >>> layer.apply(layer.init(np.random.default_rng(0)), np.ones((5, 16))).shape
    (5, 16)
    """

    attention: FavorSelfAttention
    feedforward: FeedForward
    norm: Literal["rms", "layer", "scale"] | None = "rms"
    shift: bool = False
    dropout: float = 0.0
    gate: bool = False

    @cached_property
    def parts(self) -> dict[str, Layer]:
        attention = self.attention
        norm = None if self.norm is None else NORMS[self.norm](attention.dim)
        shift = ShiftTokens(attention.causal) if self.shift else None
        return {
            name: Residual(branch, norm, shift, self.dropout, self.gate)
            for name, branch in (("attention", attention), ("feedforward", self.feedforward))
        }

    def vjp(
        self, params: Params, x: Any, *, key: Key | None = None, **options: Any
    ) -> tuple[Array, Pullback]:
        one, two = self.parts.values()
        x, pull_one = part(one, "attention", params, x, key, **options)
        x, pull_two = part(two, "feedforward", params, x, key)
        return x, lambda grad, grads: pull_one(pull_two(grad, grads), grads)

    prepare = InOrder.prepare  # its own `vjp` only hands options on


@dataclass(frozen=True, kw_only=True)
class Performer(InOrder):
    """Blocks one after the other: an encoder of rows, or what a language model is made of.

    Parameters
    ----------
    dim, depth, heads : int
        Length of a row, number of blocks, number of heads.
    num_features : int, default 128
        Number of random features.
    causal : bool, default False
        Row i sees rows up to i only.
    layers : str, default "F"
        Which blocks have random features (F) and which exact attention (E), repeated as often as
        needed: "FFFE" has one exact block in four.
    exact : bool, default False
        All blocks have exact attention: the same weights, without the approximation.
    kv_heads, dim_head, kind, antithetic, kernel_epsilon, qk, rotary, decay, learn_projection, \
local_heads, window
        As for `FavorSelfAttention`. In E blocks `qk` and `decay` are None, and no head is local.
    hidden, activation
        As for `FeedForward`.
    norm
        As for `Block`.
    final_norm : {True, False, "rms", "layer", "scale"}, default True
        What the last rows go through: a norm as in the blocks ("layer" if these have none),
        nothing, or this norm.
    shift, gate
        As for `Block`.
    dropout : float, default 0
        Share dropped in training, of what each half of a block adds.
    qkv_bias : bool, default False
        Whether the linear layer that makes queries, keys and values has a bias.
    bias : bool, default False
        Whether the other linear layers have one.

    Notes
    -----
    `vjp` and `apply` take ``mask=``, a bool for each row (..., L): True where attention may see it.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> model = nn.Performer(dim=32, depth=2, heads=2, num_features=64)
    >>> params = model.init(np.random.default_rng(0))
    >>> model.apply(params, np.ones((3, 100, 32))).shape
    (3, 100, 32)
    """

    dim: int
    depth: int
    heads: int
    num_features: int = 128
    causal: bool = False
    layers: str = "F"
    exact: bool = False
    kv_heads: int | None = None
    dim_head: int | None = None
    kind: str = "positive"
    antithetic: bool = True
    kernel_epsilon: float = 1e-3
    qk: Literal["sphere"] | None = "sphere"
    rotary: Literal["adjacent", "halves"] | None = None
    decay: float | tuple[float, ...] | None = None
    learn_projection: bool = False
    local_heads: int = 0
    window: int = 128
    hidden: int | None = None
    activation: str = "gelu"
    norm: Literal["rms", "layer", "scale"] | None = "rms"
    final_norm: Literal["rms", "layer", "scale"] | bool = True
    shift: bool = False
    gate: bool = False
    dropout: float = 0.0
    qkv_bias: bool = False
    bias: bool = False

    #: What makes the attention of a block.
    attention: ClassVar[type[FavorSelfAttention]] = FavorSelfAttention

    def __post_init__(self) -> None:
        validation.integer("depth", self.depth)
        if not self.layers or set(self.layers) - set("FE"):
            raise ValueError(f"layers must be a string of F and E, got {self.layers!r}")
        if self.norm is not None:
            validation.choice("norm", self.norm, tuple(NORMS))
        if not isinstance(self.final_norm, bool):
            validation.choice("final_norm", self.final_norm, tuple(NORMS))
        for each in self.parts["blocks"].parts.values():
            assert each.parts

    def _block(self, letter: str) -> Block:
        own = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self.attention)
            if hasattr(self, field.name)
        }
        std = None if self.gate else 0.0  # blocks begin as the identity
        own |= {"std": std, "bias": self.qkv_bias, "output_bias": self.bias}
        if letter == "E":
            own |= {"exact": True, "qk": None, "decay": None, "local_heads": 0}
        return Block(
            self.attention(**own),
            FeedForward(self.dim, self.hidden, self.activation, self.bias, std=std),
            self.norm,
            self.shift,
            self.dropout,
            self.gate,
        )

    def _body(self) -> dict[str, Layer]:
        letters = (self.layers * self.depth)[: self.depth]
        parts: dict[str, Layer] = {"blocks": Chain(tuple(map(self._block, letters)))}
        if self.final_norm:
            last = (self.norm or "layer") if self.final_norm is True else self.final_norm
            parts["norm"] = NORMS[last](self.dim)
        return parts

    @cached_property
    def parts(self) -> dict[str, Layer]:
        return self._body()

    def vjp(
        self, params: Params, x: Any, *, key: Key | None = None, **options: Any
    ) -> tuple[Array, Pullback]:
        x, pull_blocks = part(self.parts["blocks"], "blocks", params, x, key, **options)
        if not self.final_norm:
            return x, pull_blocks
        x, pull_norm = part(self.parts["norm"], "norm", params, x, key)
        return x, lambda grad, grads: pull_blocks(pull_norm(grad, grads), grads)

    prepare = InOrder.prepare  # its own `vjp` only hands options on


@dataclass(frozen=True, kw_only=True)
class PerformerLM(Performer):
    """A language model: it predicts every next token.

    Parameters
    ----------
    vocab : int
        How many tokens there are: they are integers from 0 to vocab - 1.
    dim, depth, heads, num_features, layers, exact, kv_heads, dim_head, kind, antithetic, \
kernel_epsilon, qk, decay, learn_projection, local_heads, window, hidden, activation, norm, \
final_norm, gate, dropout, qkv_bias, bias
        As for `Performer`.
    causal : bool, default True
        False: it predicts tokens from those around them, for masked language models.
    rotary : {"adjacent", "halves"}, default "adjacent"
        As for `Performer`.
    shift : bool, default True
        As for `Performer`.
    positions : {"learned", "sinusoidal"}, optional
        What is added to the embeddings.
    length : int, default 2048
        The longest input, where positions are learned.
    tied : bool, default True
        Whether logits are products with the embedding, or have a linear layer of their own.
    embedding_dropout : float, default 0
        Share of the embeddings that is dropped in training.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> model = nn.PerformerLM(vocab=256, dim=32, depth=2, heads=2, num_features=64)
    >>> params = model.init(np.random.default_rng(0))
    >>> tokens = np.frombuffer(b"to be or not to be", np.uint8)
    >>> logits, pullback = model.vjp(params, tokens[:-1], key=(0, 0))
    >>> loss, grad = nn.cross_entropy(logits, tokens[1:])
    >>> grads = nn.zeros_like(params)
    >>> pullback(grad, grads)
    >>> round(loss, 2)  # about log(256): it knows nothing yet
    5.5...
    """

    vocab: int
    causal: bool = True
    rotary: Literal["adjacent", "halves"] | None = "adjacent"
    shift: bool = True
    positions: Literal["learned", "sinusoidal"] | None = None
    length: int = 2048
    tied: bool = True
    embedding_dropout: float = 0.0

    @cached_property
    def parts(self) -> dict[str, Layer]:
        validation.integer("vocab", self.vocab)
        parts: dict[str, Layer] = {"embedding": Embedding(self.vocab, self.dim)}
        if self.positions is not None:
            validation.choice("positions", self.positions, ("learned", "sinusoidal"))
            learned = LearnedPositions(validation.integer("length", self.length), self.dim)
            parts["positions"] = (
                learned if self.positions == "learned" else SinusoidalPositions(self.dim)
            )
        if self.embedding_dropout:
            parts["dropout"] = Dropout(self.embedding_dropout)
        parts |= self._body()
        if not self.tied:
            parts["head"] = Linear(self.dim, self.vocab, self.bias)
        return parts

    def vjp(
        self, params: Params, x: Any, *, key: Key | None = None, **options: Any
    ) -> tuple[Array, Pullback]:
        pulls = []
        for name, layer in self.parts.items():
            x, pull = part(layer, name, params, x, key, **(options if name == "blocks" else {}))
            pulls.append(pull)

        def pullback(grad: Array, grads: Params) -> None:
            for pull in reversed(pulls):
                grad = pull(grad, grads)

        if not self.tied:
            return x, pullback
        table, hidden = params["embedding"]["weight"], x

        def tied_pullback(grad: Array, grads: Params) -> None:
            grad = cotangent(grad, (*hidden.shape[:-1], self.vocab), table.dtype)
            add_product(grads["embedding"]["weight"], grad, hidden)
            pullback(multiply_back(grad, table), grads)

        return multiply(hidden, table), tied_pullback

    def extend(self, params: Params, state: dict[str, Any], x: Any) -> Array:
        x = super().extend(params, state, x)
        return multiply(x, params["embedding"]["weight"]) if self.tied else x

    def prepare(self, params: Params) -> Step:
        body = super().prepare(params)
        table = params["embedding"]["weight"] if self.tied else None

        def step(state: dict[str, Any], x: Array) -> Array:
            with one_thread():
                y = body(state, x)
                return y if table is None else multiply_few(y, table)

        return step

    def generate(
        self,
        params: Params,
        prompt: Any,
        length: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> Array:
        """Continue a prompt, token by token: each costs the same, however long the text is.

        Parameters
        ----------
        params : dict
            Parameters.
        prompt : bytes, or array_like of int of shape (L,) or (batch, L)
            What to continue, L > 0.
        length : int
            How many tokens to add.
        temperature : float, default 1
            What logits are divided by; 0 takes the most likely token.
        top_k : int, optional
            Choose among so many most likely tokens.
        seed : int, default 0
            Of the choices: the same seed gives the same text.

        Returns
        -------
        ndarray of int, shape (length,) or (batch, length)
            The new tokens, of the smallest dtype that holds them: ``bytes(...)`` is text if tokens
            are bytes.

        Raises
        ------
        TypeError, ValueError
            If an argument is of the wrong type or size, or the model is not causal.

        Notes
        -----
        Blocks with exact attention keep all keys and values, and their time grows with the text.

        Examples
        --------
        >>> import numpy as np
        >>> from favor_np import nn
        >>> model = nn.PerformerLM(vocab=256, dim=16, depth=1, heads=2, num_features=16)
        >>> params = model.init(np.random.default_rng(0))
        >>> len(bytes(model.generate(params, b"to be", 10)))
        10
        """
        from favor_np.nn.generation import generate

        choice = temperature, top_k, seed
        return generate(self, params, prompt, length, choice)
