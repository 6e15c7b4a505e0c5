"""Attention of a sequence to itself: with random features in linear time, or exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from favor_np import validation
from favor_np.attention import favor_attention
from favor_np.exact import exact_attention, exact_attention_vjp
from favor_np.features import ATTENTION_KINDS, FeatureMap
from favor_np.gradients import favor_attention_vjp
from favor_np.nn.fused import Heads
from favor_np.nn.layer import Key, Layer, Pullback, Step, generator, leaf, part, within
from favor_np.nn.linear import Linear
from favor_np.nn.norms import UnitScale
from favor_np.nn.position import Rotary
from favor_np.nn.tree import Array, Params
from favor_np.projection import sample_projection
from favor_np.state import AttentionState

#: What radius**2 of queries and keys stays below; of heads that attend exactly, within a window.
BOUND, LOCAL_BOUND = 2.0, 16.0

#: Who wants to see what layers of attention work on: see `seen`.
_WATCH: ContextVar[list[Any] | None] = ContextVar("favor_np.nn.attention", default=None)


@contextmanager
def seen() -> Iterator[list[Any]]:
    """Collect (q, k, v, feature map, options) of the layers with random features, in order."""
    found: list[Any] = []
    token = _WATCH.set(found)
    try:
        yield found
    finally:
        _WATCH.reset(token)


@lru_cache(maxsize=256)
def _map_of(
    numbers: bytes, shape: tuple[int, ...], dtype: str, kind: str, scale: float, more: Any
) -> FeatureMap:
    projection = np.frombuffer(numbers, dtype).reshape(shape)
    antithetic, epsilon = more
    return FeatureMap.from_projection(
        projection, kind, scale=scale, antithetic=antithetic, kernel_epsilon=epsilon
    )


@dataclass(frozen=True)
class FavorSelfAttention(Layer):
    """Queries, keys and values of every row; attention; and a linear layer of what heads read.

    Its projection of random features is a parameter, so checkpoints have it. It is redrawn by
    `redraw`, not learned, unless `learn_projection` says so.

    Parameters
    ----------
    dim : int
        Length of the rows of input and output.
    heads : int
        Number of heads of queries.
    num_features : int, default 128
        Number of random features.
    causal : bool, default True
        Row i sees rows up to i only.
    kv_heads : int, optional
        Number of heads of keys and values, of which `heads` is a multiple; default `heads`.
    dim_head : int, optional
        Length of queries, keys and values, default ``dim // heads``.
    kind : {"positive", "relu", "elu"}, default "positive"
        The feature map: see `favor_np.feature_map`.
    antithetic : bool, default True
        As in `favor_np.feature_map`.
    kernel_epsilon : float, default 1e-3
        Constant of the "relu" features.
    qk : {"sphere", None}, default "sphere"
        "sphere": queries and keys are put on spheres of learned radius (`UnitScale`), so that
        random features stay accurate, and attention is ``softmax(q k^T)``. None: they are as they
        are, and it is ``softmax(q k^T / sqrt(dim_head))``.
    rotary : {"adjacent", "halves"}, optional
        Rotate queries and keys by their position: see `Rotary`.
    decay : float or tuple of float, optional
        What the weight of a key is multiplied with at every later row, one for all heads of keys
        or one for each that is not local; those within a window have none.
    exact : bool, default False
        Exact attention; the projection, if there is one, is not used.
    bias : bool, default False
        Whether the linear layer that makes queries, keys and values has a bias.
    output_bias : bool, default True
        Whether the last linear layer has one.
    std : float, optional
        Standard deviation of the first weights of the last linear layer, default its inputs**-0.5.
    learn_projection : bool, default False
        Compute the gradient of the projection, which then is no longer that of softmax attention.
    local_heads : int, default 0
        How many of the heads, the last ones, have exact attention to what is near: fewer than
        `heads`, and whole groups where heads share keys. On the sphere their radius**2 is at most
        16, so that they can be sharper.
    window : int, default 128
        How many rows these heads see: the last ones, their own included; if not causal, as many to
        either side.

    Examples
    --------
    >>> import numpy as np
    >>> from favor_np import nn
    >>> layer = nn.FavorSelfAttention(dim=16, heads=2, num_features=32)
    >>> params = layer.init(np.random.default_rng(0))
    >>> layer.apply(params, np.ones((3, 100, 16))).shape
    (3, 100, 16)
    """

    dim: int
    heads: int
    num_features: int = 128
    causal: bool = True
    kv_heads: int | None = None
    dim_head: int | None = None
    kind: str = "positive"
    antithetic: bool = True
    kernel_epsilon: float = 1e-3
    qk: Literal["sphere"] | None = "sphere"
    rotary: Literal["adjacent", "halves"] | None = None
    decay: float | tuple[float, ...] | None = None
    exact: bool = False
    bias: bool = False
    output_bias: bool = True
    std: float | None = None
    learn_projection: bool = False
    local_heads: int = 0
    window: int = 128

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "num_features", "_kv_heads", "_dim_head", "window"):
            validation.integer(name.lstrip("_"), getattr(self, name))
        validation.choice("kind", self.kind, ATTENTION_KINDS)
        if self.heads % self._kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads}")
        if self.dim_head is None and self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads ({self.heads}), got {self.dim}")
        if self.rotary is not None and self._dim_head % 2:
            raise ValueError(f"rotary needs heads of even length, got {self._dim_head}")
        if self.qk not in ("sphere", None):
            raise ValueError(f"qk must be 'sphere' or None, got {self.qk!r}")
        if self._antithetic and self.num_features % 2:
            raise ValueError(f"num_features must be even if antithetic, got {self.num_features}")
        group = self.heads // self._kv_heads
        local = validation.integer("local_heads", self.local_heads, minimum=0)
        if local >= self.heads or local % group:
            raise ValueError(
                f"local_heads must be less than heads ({self.heads}) and a multiple of {group}, "
                f"got {local}"
            )
        if self.decay is not None:
            shape, far = validation.decay_of(self.decay, causal=self.causal).shape, self._kv_far
            if shape not in ((), (1,), (far,)):
                raise ValueError(
                    "decay must be one number, or one for each head of keys that is not local "
                    f"({far}), got shape {shape}"
                )

    @property
    def _kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def _dim_head(self) -> int:
        return self.dim // self.heads if self.dim_head is None else self.dim_head

    @property
    def _antithetic(self) -> bool:
        return self.antithetic and self.kind == "positive"

    @property
    def _grouped(self) -> bool:
        return self.heads > self._kv_heads

    @property
    def _kv_far(self) -> int:
        """How many heads of keys are not local: the first ones."""
        return self._kv_heads - self.local_heads * self._kv_heads // self.heads

    @cached_property
    def _sphere(self) -> UnitScale | None:
        if self.qk is None:
            return None
        far = self._kv_far
        bounds = (BOUND,) * far + (LOCAL_BOUND,) * (self._kv_heads - far)
        return UnitScale(self._kv_heads, bounds)

    @cached_property
    def _rotary(self) -> Rotary | None:
        return None if self.rotary is None else Rotary(self._dim_head, self.rotary)

    @property
    def _scale(self) -> float:
        return 1.0 if self.qk == "sphere" else self._dim_head**-0.5

    @cached_property
    def parts(self) -> dict[str, Layer]:
        d = self._dim_head
        parts: dict[str, Layer] = {
            "qkv": Linear(self.dim, (self.heads + 2 * self._kv_heads) * d, self.bias)
        }
        if self._sphere is not None:
            parts["sphere"] = self._sphere
        parts["output"] = Linear(self.heads * d, self.dim, self.output_bias, self.std)
        return parts

    def _draw(self, rng: np.random.Generator) -> Array:
        rows = self.num_features // 2 if self._antithetic else self.num_features
        projection: Array = sample_projection(rows, self._dim_head, rng=rng, dtype=np.float32)
        return projection

    def init(self, rng: np.random.Generator) -> Params:
        params = super().init(rng)
        if not self.exact:
            params["projection"] = self._draw(rng)
        return params

    def redraw(self, params: Params, key: Key) -> None:
        if "projection" in params and not self.learn_projection:
            params["projection"][...] = self._draw(generator(key))

    def feature_map(self, params: Params) -> FeatureMap:
        """Return the feature map that the parameters hold."""
        rows = self.num_features // 2 if self._antithetic else self.num_features
        w = leaf(params, "projection", (rows, self._dim_head))
        more = self._antithetic, self.kernel_epsilon
        return _map_of(w.tobytes(), w.shape, w.dtype.str, self.kind, self._scale, more)

    def _lengths(self, params: Params) -> Array | None:
        """Return how long queries and keys of each head are, if they are on spheres."""
        if self._sphere is None:
            return None
        with within("sphere"):
            radii = self._sphere.lengths(params.get("sphere", {}))
        return np.concatenate([np.repeat(radii, self.heads // self._kv_heads), radii])

    def _heads(self, lengths: Array | None, start: int, count: int, dtype: Any) -> Heads:
        """Return how rows from the position `start` on are cut into heads."""
        turns = None if self._rotary is None else self._rotary.turns(start, count, dtype)
        return Heads(
            (self.heads, self._kv_heads, self._kv_heads),
            self._dim_head,
            lengths=lengths,
            turns=turns,
            adjacent=self.rotary != "halves",
        )

    def _add_to_sphere(self, lengths: Array, of_lengths: Array, grads: Params) -> None:
        """Add the gradient of the radii, which queries share with keys."""
        assert self._sphere is not None
        of_q = of_lengths[: self.heads].reshape(self._kv_heads, -1).sum(-1)
        self._sphere.add_gradient(
            lengths[self.heads :], of_q + of_lengths[self.heads :], grads["sphere"]
        )

    @cached_property
    def _plain(self) -> Heads:
        """How heads of results are put together."""
        return Heads((self.heads, 0, 0), self._dim_head)

    def _joined(self, out: Array) -> Array:
        """Return rows (..., L, heads * d) of heads (..., heads, L, d)."""
        if out.shape[-2] == 1:
            return out.reshape(*out.shape[:-3], 1, -1)
        none = np.empty((*out.shape[:-3], 0, *out.shape[-2:]), out.dtype)
        return self._plain.merge((out, none, none))[0]

    def _cut(self, q: Any, k: Any, v: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return queries, keys and values of the heads that see far, and of those that do not."""
        counts = self.heads - self.local_heads, self._kv_far, self._kv_far
        cut = [np.split(x, [n], axis=-3) for x, n in zip((q, k, v), counts, strict=True)]
        far, near = zip(*cut, strict=True)
        return far, near

    def attend_vjp(self, params: Params, q: Any, k: Any, v: Any, **options: Any) -> tuple[Any, Any]:
        """Attend with random features: what stands between the linear layers."""
        return favor_attention_vjp(q, k, v, self.feature_map(params), decay=self.decay, **options)

    def _far_vjp(self, params: Params, q: Any, k: Any, v: Any, **options: Any) -> tuple[Array, Any]:
        """Attend to all that a row may see; pulled back to q, k, v and the projection, or None."""
        pull: Any
        if self.exact:
            out, pull = exact_attention_vjp(q, k, v, scale=self._scale, decay=self.decay, **options)
        else:
            watch = _WATCH.get()
            if watch is not None:
                watch.append((q, k, v, self.feature_map(params), options | {"decay": self.decay}))
            out, pull = self.attend_vjp(params, q, k, v, **options)
        learns = self.learn_projection and not self.exact

        def pullback(grad: Array) -> tuple[Any, ...]:
            found = pull(grad)
            return found.q, found.k, found.v, found.projection if learns else None

        return out, pullback

    def _heads_vjp(
        self, params: Params, q: Any, k: Any, v: Any, **options: Any
    ) -> tuple[Array, Any]:
        """Attend with all heads, and as `_far_vjp`."""
        if not self.local_heads:
            return self._far_vjp(params, q, k, v, **options)
        far, near = self._cut(q, k, v)
        band = self.window if self.causal else (self.window - 1,) * 2
        out, pull_far = self._far_vjp(params, *far, **options)
        out_near, pull_near = exact_attention_vjp(*near, scale=self._scale, window=band, **options)

        def pullback(grad: Array) -> tuple[Any, ...]:
            one, two = np.split(grad, [self.heads - self.local_heads], axis=-3)
            *of_far, projection = pull_far(one)
            both = zip(of_far, pull_near(two)[:3], strict=True)
            return *(np.concatenate(pair, -3) for pair in both), projection

        return np.concatenate([out, out_near], -3), pullback

    def vjp(
        self, params: Params, x: Any, *, key: Key | None = None, mask: Any = None
    ) -> tuple[Array, Pullback]:
        if np.ndim(x) < 2 or not np.size(x):
            raise ValueError(f"x must have shape (..., L, {self.dim}), L > 0, got {np.shape(x)}")
        qkv, pull_qkv = part(self.parts["qkv"], "qkv", params, x, key)
        heads = self._heads(self._lengths(params), 0, qkv.shape[-2], qkv.dtype)
        q, k, v = heads.split(qkv)
        options: dict[str, Any] = {"causal": self.causal, "enable_gqa": self._grouped}
        if mask is not None:
            options["key_mask"] = np.asarray(mask)[..., None, :]
        out, pull = self._heads_vjp(params, q, k, v, **options)
        y, pull_output = part(self.parts["output"], "output", params, self._joined(out), key)

        def pullback(grad: Array, grads: Params) -> Array:
            *of_heads, of_projection = pull(self._plain.split(pull_output(grad, grads))[0])
            if of_projection is not None:
                grads["projection"] += of_projection
            rows, of_lengths = heads.merge(of_heads, qkv)
            if heads.lengths is not None:
                self._add_to_sphere(heads.lengths, of_lengths, grads)
            return pull_qkv(rows, grads)

        return y, pullback

    def extend(self, params: Params, state: dict[str, Any], x: Any) -> Array:
        if not self.causal:
            raise ValueError("causal must be True to go on from earlier rows, got False")
        qkv, _ = part(self.parts["qkv"], "qkv", params, x)
        read = self._extend_rows(params, state, qkv, self._lengths(params))
        return part(self.parts["output"], "output", params, read)[0]

    def prepare(self, params: Params) -> Step:
        if not self.causal:
            return super().prepare(params)
        steps = {}
        for name in ("qkv", "output"):
            with within(name):
                steps[name] = self.parts[name].prepare(params.get(name, {}))
        qkv, output, lengths = steps["qkv"], steps["output"], self._lengths(params)

        def step(state: dict[str, Any], x: Array) -> Array:
            return output({}, self._extend_rows(params, state, qkv({}, x), lengths))

        return step

    def _extend_rows(
        self, params: Params, state: dict[str, Any], qkv: Array, lengths: Array | None
    ) -> Array:
        """Return what heads read for the next rows."""
        start, count = state.get("length", 0), qkv.shape[-2]
        state["length"] = start + count
        q, k, v = self._heads(lengths, start, count, qkv.dtype).split(qkv)
        extend_far = self._extend_exact if self.exact else self._extend_favor
        if self.local_heads:
            far, near = self._cut(q, k, v)
            out = np.concatenate(
                [extend_far(params, state, *far), self._extend_near(state, *near)], -3
            )
        else:
            out = extend_far(params, state, q, k, v)
        return self._joined(out)

    def _extend_favor(self, params: Params, state: dict[str, Any], q: Any, k: Any, v: Any) -> Array:
        if "attention" not in state:
            lead, fm = k.shape[:-2], self.feature_map(params)
            state["attention"] = AttentionState(
                fm, v.shape[-1], lead, decay=self.decay, dtype=k.dtype
            )
        memory = state["attention"]
        if q.shape[-2] == 1:
            if not self._grouped:
                return np.asarray(memory.step(q, k, v))
            shared = q.reshape(*k.shape[:-2], -1, q.shape[-1])  # the queries of each head of keys
            return np.asarray(memory.update(k, v).attend(shared)).reshape(q.shape)
        out, state["attention"] = favor_attention(
            q,
            k,
            v,
            memory.feature_map,
            causal=True,
            enable_gqa=self._grouped,
            decay=self.decay,
            state=memory,
            return_state=True,
        )
        return out

    def _extend_exact(self, params: Params, state: dict[str, Any], q: Any, k: Any, v: Any) -> Array:
        """Keep all keys and values: a token costs as much as there are tokens before it."""
        end = state["length"]
        known = end - k.shape[-2]
        for name, new in (("keys", k), ("values", v)):
            kept = state.get(name)
            if kept is None or kept.shape[-2] < end:
                shape = (*new.shape[:-2], 1 << (end - 1).bit_length(), new.shape[-1])
                grown = np.empty(shape, new.dtype)
                if kept is not None:
                    grown[..., :known, :] = kept[..., :known, :]
                kept = state[name] = grown
            kept[..., known:end, :] = new
        options: dict[str, Any] = {"scale": self._scale, "enable_gqa": self._grouped}
        if not known:
            return exact_attention(q, k, v, causal=True, decay=self.decay, **options)
        found = [
            exact_attention(
                q[..., i : i + 1, :],
                state["keys"][..., : known + i + 1, :],
                state["values"][..., : known + i + 1, :],
                key_bias=self._faded(known + i + 1),
                **options,
            )
            for i in range(q.shape[-2])
        ]
        return np.concatenate(found, -2)

    def _faded(self, count: int) -> Array | None:
        """Return the logarithms of what is left of the weights of so many keys at the last one."""
        if self.decay is None:
            return None
        faded: Array = np.log(self.decay)[..., None] * np.arange(count - 1, -1, -1)
        return faded

    def _extend_near(self, state: dict[str, Any], q: Any, k: Any, v: Any) -> Array:
        """Keep the keys and values of a window."""
        count = q.shape[-2]
        if "near" in state:
            k, v = (np.concatenate(both, -2) for both in zip(state["near"], (k, v), strict=True))
        first = max(k.shape[-2] - self.window + 1, 0)
        state["near"] = k[..., first:, :], v[..., first:, :]
        before = k.shape[-2] - count
        options: dict[str, Any] = {"scale": self._scale, "enable_gqa": self._grouped}
        if count == 1:
            return exact_attention(q, k, v, **options)
        q = np.pad(q, [(0, 0)] * (q.ndim - 2) + [(before, 0), (0, 0)])
        out = exact_attention(q, k, v, causal=True, window=self.window, **options)
        return out[..., before:, :]
