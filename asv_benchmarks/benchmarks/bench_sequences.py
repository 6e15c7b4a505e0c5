"""Grouped queries, packed sequences, decay and windows, each beside what it replaces; causal."""

import numpy as np

import favor_np

from .common import TIMER, feature_map, full_only, inputs, warm

#: Sequences whose lengths differ by a thousand times.
LENGTHS = [8, 21, 58, 155, 417, 1120, 3008, 8000]


class Variant:
    """One call of `favor_attention`, made by the function of the parameter's name."""

    timer = TIMER
    param_names = ("variant",)

    def setup(self, variant):
        arrays, options = getattr(self, variant)()
        fm = feature_map()
        self.call = lambda: favor_np.favor_attention(*arrays, fm, causal=True, **options)
        warm((type(self), variant), self.call)


class Grouped(Variant):
    """L = 8192, eight heads of queries, two of keys and values."""

    params = (["gqa", "repeated"],)

    def gqa(self):
        q, k, v = inputs(8192, heads=8)
        return (q, k[:, :2], v[:, :2]), {"enable_gqa": True}

    def repeated(self):
        (q, k, v), _ = self.gqa()
        return (q, *(np.repeat(x, 4, axis=1) for x in (k, v))), {}

    def time_causal(self, variant):
        self.call()


class Packed(Variant):
    """Eight sequences of 8 to 8000 positions, four heads: end to end, padded to 8000, in a loop."""

    params = (["packed", "padded", "apart"],)

    def packed(self):
        return inputs(sum(LENGTHS)), {"cu_seqlens": np.cumsum([0, *LENGTHS])}

    def padded(self):
        q, k, v = (np.repeat(x, len(LENGTHS), axis=0) for x in inputs(max(LENGTHS)))
        mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None, None]
        return (q, k, v), {"key_mask": mask}

    def setup(self, variant):
        if variant != "apart":
            super().setup(variant)
            return
        parts = [[x[:, :, :n] for x in inputs(max(LENGTHS))] for n in LENGTHS]
        fm = feature_map()
        self.call = lambda: [favor_np.favor_attention(*x, fm, causal=True) for x in parts]
        warm((type(self), variant), self.call)

    def time_causal(self, variant):
        self.call()


class Weighted(Variant):
    """L = 8192, four heads: all keys alike, weighted or fading ones, the last keys only."""

    params = (
        ["plain", "decay", "fast_decay", "key_bias", "gates", "window_64", "window_256",
         "window_1024"],
    )  # fmt: skip

    def plain(self):
        return inputs(8192), {}

    def decay(self):
        return inputs(8192), {"decay": 0.99}

    def fast_decay(self):
        return inputs(8192), {"decay": 0.1}

    def key_bias(self):
        return inputs(8192), {"key_bias": np.random.default_rng(0).normal(size=(4, 8192))}

    def gates(self):
        return inputs(8192), {"decay": np.random.default_rng(0).uniform(0.9, 1, (1, 4, 8192))}

    def window_64(self):
        return inputs(8192), {"window": 64}

    def window_256(self):
        return inputs(8192), {"window": 256}

    def window_1024(self):
        return inputs(8192), {"window": 1024}

    def time_causal(self, variant):
        self.call()

    def time_gradient(self, variant):
        (q, k, v), options = getattr(self, variant)()
        pullback = favor_np.favor_attention_vjp(q, k, v, feature_map(), causal=True, **options)[1]
        pullback(v)


class ExactOptions:
    """Exact attention, L = 8192, four heads: windows beside all keys, and what a key can weigh."""

    params = (["plain", "window_64", "window_256", "window_1024", "key_bias", "gates", "packed"],)
    timer = TIMER
    param_names = ("variant",)

    def setup(self, variant):
        full_only(variant == "plain")
        self.arrays, self.options = inputs(8192), {"causal": True, "window": 256}
        if variant == "plain":
            self.options = {"causal": True}
        elif variant == "key_bias":
            self.options["key_bias"] = np.random.default_rng(0).standard_normal((4, 8192))
        elif variant == "gates":
            self.options["decay"] = np.random.default_rng(0).uniform(0.9, 1, (1, 4, 8192))
        elif variant == "packed":
            self.options["cu_seqlens"] = np.arange(0, 8193, 512)
        else:
            self.options["window"] = int(variant.removeprefix("window_"))
        warm(
            (type(self), variant), lambda: [self.time_causal(variant), self.time_gradient(variant)]
        )

    def time_causal(self, variant):
        favor_np.exact_attention(*self.arrays, **self.options)

    def time_gradient(self, variant):
        favor_np.exact_attention_vjp(*self.arrays, **self.options)[1](self.arrays[2])


class Decode:
    """A token of eight heads: AttentionState, with and without decay, and WindowState."""

    params = (["plain", "decay", "window_64", "window_4096"],)
    timer = TIMER
    param_names = ("state",)

    def setup(self, name):
        rng = np.random.default_rng(0)
        self.token = rng.standard_normal((3, 8, 64), np.float32)
        options = {"value_dim": 64, "batch_shape": 8, "decay": 0.99 if name == "decay" else None}
        if name.startswith("window"):
            window = int(name.removeprefix("window_"))
            self.state = favor_np.WindowState(feature_map(), window=window, **options)
            self.state.update(*rng.standard_normal((2, 8, window, 64), np.float32))
        else:
            self.state = favor_np.AttentionState.zeros(feature_map(), **options)
        warm((type(self), name), lambda: self.time_steps(name))

    def time_steps(self, name):
        """Sixty-four tokens: some of a window take longer than others."""
        for _ in range(64):
            self.state.step(*self.token)
