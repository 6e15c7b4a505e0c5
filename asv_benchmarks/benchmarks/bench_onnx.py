"""ONNX models in onnxruntime, on one thread: export, a sequence and a token, beside favor_np."""

import functools

import numpy as np

import favor_np
from favor_np import nn
from favor_np.forecast import PerformerForecaster

from .common import TIMER, favor, feature_map, full_only, inputs, interleave, ratio

try:
    import onnxruntime

    from favor_np.interop.onnx import empty_state, export_attention, export_model
except ImportError:
    onnxruntime = None

HEADS, DIM = 4, 64
CAUSAL = ["chunk", "gated"]
FORMS = [*CAUSAL, "whole"]


def exported(form):
    """Attention in a form."""
    if onnxruntime is None:
        raise NotImplementedError("needs onnx and onnxruntime")
    fm = feature_map()
    return export_attention(fm, heads=HEADS, value_dim=DIM, causal=form != "whole", form=form)


def language_model():
    """A language model of bytes, and parameters."""
    model = nn.PerformerLM(vocab=256, dim=256, depth=4, heads=HEADS)
    return model, model.init(np.random.default_rng(0))


class Session:
    """A model that onnxruntime runs on one thread."""

    def __init__(self, model):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        content = model.SerializeToString()
        self._run = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        ).run
        self._names = [x.name.replace("present", "past") for x in model.graph.output]
        self.state = empty_state(model)

    def __call__(self, **arrays):
        """Run, and go on from here the next time."""
        outputs = self._run(None, arrays | self.state)
        after = zip(self._names, outputs, strict=True)
        self.state = {name: array for name, array in after if name in self.state}


def flat(x):
    """Heads side by side."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(1, x.shape[2], -1)


class Export:
    """Time to write a model of attention."""

    timer = TIMER
    params = (FORMS,)
    param_names = ("form",)

    def setup(self, form):
        exported(form)

    def time_export(self, form):
        exported(form)


class Sequence:
    """Time of attention over favor_np's."""

    params = (FORMS, [1024, 8192])
    param_names = ("form", "length")

    def setup(self, form, length):
        full_only(length > 1024)
        self.session = Session(exported(form))

    def track_over_favor_np(self, form, length):
        arrays = dict(zip("qkv", map(flat, inputs(length)), strict=True))
        ours = favor(f"L={length} d={DIM} m=256", causal=form != "whole", threads=1)
        return ratio(*interleave(lambda: self.session(**arrays), ours).T)


class Token:
    """Time of a token over favor_np's."""

    params = (CAUSAL,)
    param_names = ("form",)

    def setup(self, form):
        self.session = Session(exported(form))

    def track_over_favor_np(self, form):
        q, k, v = (x[:, :, :1] for x in inputs(1024))
        arrays = dict(zip("qkv", map(flat, (q, k, v)), strict=True))
        state = favor_np.AttentionState.zeros(feature_map(), DIM, (1, HEADS))
        return ratio(
            *interleave(
                lambda: self.session(**arrays), lambda: state.step(q, k, v, num_threads=1)
            ).T
        )


class LanguageModel:
    """Time to write a language model; that of a prompt, and of a token after it, over favor_np's."""

    timer = TIMER
    params = (CAUSAL,)
    param_names = ("form",)

    def setup(self, form):
        exported(form)  # or there is no onnxruntime
        self.model, self.weights = language_model()
        self.session = Session(export_model(self.model, self.weights, form=form))

    def time_export(self, form):
        export_model(self.model, self.weights, form=form)

    def over_favor_np(self, tokens, step):
        """The ratio for a text that goes on with these tokens: for us, by ``step(state, tokens)``."""
        state = {}

        def ours():
            with favor_np.thread_limit(1):
                step(state, tokens)

        return ratio(*interleave(lambda: self.session(tokens=tokens), ours).T)

    def track_prompt_over_favor_np(self, form):
        extend = functools.partial(self.model.extend, self.weights)
        return self.over_favor_np(np.zeros((1, 1024), np.int64), extend)

    def track_token_over_favor_np(self, form):
        return self.over_favor_np(np.zeros((1, 1), np.int64), self.model.prepare(self.weights))


class Forecaster:
    """Time to write a forecaster, and that of a forecast over favor_np's."""

    timer = TIMER

    def setup(self):
        exported("chunk")  # or there is no onnxruntime
        self.rows = np.random.default_rng(0).standard_normal((2500, 1))
        self.forecaster = PerformerForecaster(epochs=1).fit(self.rows)
        self.session = Session(export_model(self.forecaster))

    def time_export(self):
        export_model(self.forecaster)

    def track_over_favor_np(self):
        x = self.rows[None].astype(np.float32)

        def ours():
            with favor_np.thread_limit(1):
                self.forecaster.predict(self.rows)

        return ratio(*interleave(lambda: self.session(x=x), ours).T)
