"""Attention as ONNX models beside favor_np: export, a long sequence, a token; one run, one thread.

    pip install onnx onnxruntime
    python tools/onnx_times.py

Every output is compared with favor_np's before the clock runs.  The operator LinearAttention is timed
alone as well, given the features of queries and keys, which a user would have to compute first.
A time is the best of several.
"""

import dataclasses
import functools
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from peers import Entry, agree, interleave, table
from rivals import DIM, FEATURES, HEADS, Case

import favor_np
from favor_np.interop.onnx import export_attention, to_onnx_state

LENGTH, TOKENS, ROUNDS = 8192, 50, 20
OPERATORS = {"onnxruntime's": 17, "standard": 27}


def session(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    content = model.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def flat(x):
    return x.swapaxes(1, 2).reshape(len(x), x.shape[2], -1)


def feature_map(case):
    return favor_np.FeatureMap.from_projection(case.projection)


def empty(fm):
    return to_onnx_state(favor_np.AttentionState.zeros(fm, DIM, (1, HEADS)))


@dataclasses.dataclass
class Model:
    """An exported model, with the inputs of a case."""

    case: Case
    options: dict

    @functools.cached_property
    def session(self):
        return session(self.model)

    @functools.cached_property
    def model(self):
        fm = feature_map(self.case)
        start = time.perf_counter()
        model = export_attention(fm, heads=HEADS, value_dim=DIM, **self.options)
        self.export_seconds = time.perf_counter() - start
        return model

    @functools.cached_property
    def inputs(self):
        arrays = dict(zip("qkv", map(flat, self.case.arrays), strict=True))
        return {**arrays, **empty(feature_map(self.case))}

    def __call__(self):
        out = self.session.run(["out"], self.inputs)[0]
        return out.reshape(1, -1, HEADS, DIM).swapaxes(1, 2)

    def decode(self):
        """A step that goes on from the one before, whose arrays stay where they are."""
        first = {n: x[:, :1] if n in "qkv" else x for n, x in self.inputs.items()}
        values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(x) for n, x in first.items()}
        turns = [self.session.io_binding() for _ in range(2)]
        states = [n for n in first if n.startswith("past_")]
        out = np.empty((1, 1, HEADS * DIM), np.float32)
        values["out"] = onnxruntime.OrtValue.ortvalue_from_numpy(out)
        others = {n: onnxruntime.OrtValue.ortvalue_from_numpy(first[n]) for n in states}
        for turn, before, after in ((turns[0], values, others), (turns[1], others, values)):
            for name in first:
                turn.bind_ortvalue_input(name, (before if name in states else values)[name])
            turn.bind_ortvalue_output("out", values["out"])
            for name in states:
                turn.bind_ortvalue_output(name.replace("past", "present"), after[name])

        def run():
            for i in range(TOKENS):
                self.session.run_with_iobinding(turns[i % 2])

        return run


def steps(case):
    q, k, v = (x[:, :, :1] for x in case.arrays)
    state = favor_np.AttentionState.zeros(feature_map(case), DIM, (1, HEADS))

    def run():
        for _ in range(TOKENS):
            state.step(q, k, v, num_threads=1)

    return run


def operator(case, opset):
    """LinearAttention alone: features given, a last column of values for the denominators."""
    domain = "" if opset == 27 else "com.microsoft"
    q, k, v = case.arrays
    y = q @ case.weight.T
    queries = np.exp(y - y.max(-1, keepdims=True))
    y = k @ case.weight.T - 0.5 * DIM**-0.5 * (k * k).sum(-1, keepdims=True)
    keys = np.exp(y - y.max((-1, -2), keepdims=True))
    values = np.concatenate([v, np.ones_like(v[..., :1])], -1)
    named = {"q": flat(queries), "k": flat(keys), "v": flat(values)}
    named["state"] = np.zeros((1, HEADS, FEATURES, DIM + 1), np.float32)
    options = {"q_num_heads": HEADS, "kv_num_heads": HEADS, "update_rule": "linear", "scale": 1.0}
    names = ["q", "k", "v", "state"]
    node = helper.make_node("LinearAttention", names, ["out", "after"], domain=domain, **options)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * axes)
        for name, axes in (("q", 3), ("k", 3), ("v", 3), ("state", 4), ("out", 3), ("after", 4))
    ]
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    graph = helper.make_graph([node], "operator", ends[:4], ends[4:])
    version = helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    runs = session(helper.make_model(graph, opset_imports=opsets, ir_version=version))

    def run():
        out = runs.run(["out"], named)[0].reshape(1, -1, HEADS, DIM + 1).swapaxes(1, 2)
        return out[..., :-1] / out[..., -1:]

    return run


def main():
    causal, whole = (Case(task, LENGTH, 1) for task in ("causal", "bidirectional"))
    models = {'"chunk"': Model(causal, {"form": "chunk"})}
    for name, opset in OPERATORS.items():
        models[f'"gated", {name} operator'] = Model(causal, {"form": "gated", "opset": opset})
    models['"whole"'] = Model(whole, {"causal": False})
    prefill = {
        task: [Entry("favor_np", case.favor(case.projection, False))]
        + [Entry(name, model) for name, model in models.items() if model.case is case]
        for task, case in (("causal", causal), ("bidirectional", whole))
    }
    for name, opset in OPERATORS.items():
        call = operator(causal, opset)
        prefill["causal"].append(Entry(f"{name} LinearAttention, given features", call))
    for group in prefill.values():
        expected = group[0].call()
        for entry in group[1:]:
            agree(entry.name, entry.call(), expected)
        interleave(group, ROUNDS)
    decode = [Entry("favor_np", steps(causal))]
    decode += [
        Entry(name, model.decode()) for name, model in models.items() if model.case is causal
    ]
    interleave(decode, ROUNDS)
    tokens = {entry.name: min(entry.seconds) / TOKENS * 1e6 for entry in decode}
    rows = []
    for task, group in prefill.items():
        for entry in group:
            cells = dict.fromkeys(("export", "token"), "")
            if entry.name in models:
                cells["export"] = f"{models[entry.name].export_seconds * 1e3:.0f}"
            if entry.name in tokens and task == "causal":
                cells["token"] = f"{tokens[entry.name]:.0f}"
            seconds, ours = min(entry.seconds), min(group[0].seconds)
            times = f"{seconds * 1e3:.0f}", f"{seconds / ours:.2f}"
            rows.append([f"{task}: {entry.name}", cells["export"], *times, cells["token"]])
    header = [f"L = {LENGTH:,}", "export, ms", "sequence, ms", "to favor_np", "a token, µs"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
