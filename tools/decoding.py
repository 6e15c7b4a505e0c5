"""The next byte of a language model: favor_np.nn beside a recurrent decoder in PyTorch and performer-pytorch.

    pip install torch performer-pytorch      # what is missing is left out
    python tools/decoding.py

All have dim 256, 4 layers, 4 heads and 128 features, and one thread. The decoder in PyTorch is one
written by hand for speed: the weights of favor_np's model, one state a layer, no module, inference
mode; its logits are checked. performer-pytorch keeps no state: a byte costs a pass over the text.
Calls are interleaved, and the least processor times printed: what else the machine does shows least.
"""

import argparse
import os
import subprocess
import sys
import time

PINS = ["FAVOR_NP_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"]
DIM, DEPTH, HEADS, FEATURES = 256, 4, 4, 128


def own():
    """Return the model, its parameters, and what reads a byte and returns logits."""
    import numpy as np

    from favor_np import nn

    model = nn.PerformerLM(vocab=256, dim=DIM, depth=DEPTH, heads=HEADS, num_features=FEATURES)
    rng = np.random.default_rng(0)
    params = model.init(rng)
    for name, array in nn.leaves(params):
        if not name.endswith("projection"):
            array += 0.05 * rng.standard_normal(array.shape, np.float32)
    step, state = model.prepare(params), {}
    return model, params, lambda byte: step(state, np.array([[byte]]))[0, 0]


def recurrent(params):
    """Return what reads a byte and returns logits, in PyTorch."""
    import torch

    F = torch.nn.functional
    d = DIM // HEADS

    def tensors(tree):
        if isinstance(tree, dict):
            return {name: tensors(x) for name, x in tree.items()}
        return torch.from_numpy(tree.copy())

    p = tensors(params)
    table, last = p["embedding"]["weight"], p["norm"]["weight"]
    frequency = 1e4 ** (-torch.arange(0, d, 2) / d)
    blocks = []
    for block in p["blocks"].values():
        one, two = block["attention"], block["feedforward"]
        attention, ahead = one["branch"], two["branch"]
        lengths = (2 * torch.sigmoid(attention["sphere"]["radius"])).sqrt()[:, None]
        blocks.append({
            "norms": (one["norm"]["weight"], two["norm"]["weight"]),
            "before": [torch.zeros(DIM // 2), torch.zeros(DIM // 2)],
            "qkv": attention["qkv"]["weight"], "out": attention["output"]["weight"],
            "lengths": torch.cat([lengths, lengths]), "w": attention["projection"].T.contiguous(),
            "S": torch.zeros(HEADS, FEATURES, d), "z": torch.zeros(HEADS, FEATURES, 1),
            "up": (ahead["up"]["weight"], ahead["down"]["weight"]),
        })  # fmt: skip

    def shifted(x, block, which):
        before, block["before"][which] = block["before"][which], x[DIM // 2 :]
        return torch.cat([x[: DIM // 2], before])

    def attend(x, block, cos, sin):
        y = F.linear(x, block["qkv"]).view(3 * HEADS, d)
        qk = F.normalize(y[: 2 * HEADS], dim=-1) * block["lengths"]
        a, b = qk[:, ::2], qk[:, 1::2]
        qk = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(1)
        raw = qk @ block["w"]
        phi = torch.cat([raw, -raw], -1).exp_()
        k = phi[HEADS:, :, None]
        block["S"] += k * y[2 * HEADS :, None]
        block["z"] += k
        q = phi[:HEADS, None]
        return F.linear(((q @ block["S"]) / (q @ block["z"])).flatten(), block["out"])

    position = 0

    def step(byte):
        nonlocal position
        angle = position * frequency
        cos, sin = angle.cos(), angle.sin()
        position += 1
        x = table[byte]
        for block in blocks:
            y = shifted(F.rms_norm(x, (DIM,), block["norms"][0], 1e-6), block, 0)
            x = x + attend(y, block, cos, sin)
            y = shifted(F.rms_norm(x, (DIM,), block["norms"][1], 1e-6), block, 1)
            up, down = block["up"]
            x = x + F.linear(F.gelu(F.linear(y, up)), down)
        return F.linear(F.rms_norm(x, (DIM,), last, 1e-6), table)

    return torch.inference_mode()(step)


def whole(length):
    """Return performer-pytorch's pass over a text, which is what a byte costs there."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from performer_pytorch import PerformerLM

        model = PerformerLM(
            num_tokens=256, max_seq_len=length, dim=DIM, depth=DEPTH, heads=HEADS,
            dim_head=DIM // HEADS, nb_features=FEATURES, causal=True,
        ).eval()  # fmt: skip
    tokens = torch.zeros((1, length), dtype=torch.long)
    return torch.inference_mode()(lambda: model(tokens))


def least(calls, rounds):
    """Return the least processor time of each call, in milliseconds."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, (call, times) in calls.items():
            for _ in range(times):
                began = time.process_time()
                call()
                found[name] = min(found[name], 1e3 * (time.process_time() - began))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=1024, help="bytes before (1024)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if os.environ.get(PINS[0]) != "1":  # read before NumPy loads
        sys.exit(
            subprocess.call([sys.executable, *sys.argv], env=os.environ | dict.fromkeys(PINS, "1"))
        )
    import numpy as np

    _, params, step = own()
    text = np.random.default_rng(1).integers(0, 256, options.length).tolist()
    calls = {"favor_np": (lambda: step(7), 50)}
    try:
        import torch

        torch.set_num_threads(1)
        other = recurrent(params)
        calls["PyTorch, recurrent, by hand"] = (lambda: other(7), 50)
    except ImportError:
        print("PyTorch is left out: pip install torch")
        other = step
    for byte in text:
        mine, its = step(byte), np.asarray(other(byte))
    if other is not step:
        error = abs(mine - its).max() / abs(mine).max()
        assert error < 1e-3, error
        print(f"logits after {options.length} bytes differ by {error:.1e} of the largest")
    try:
        calls["performer-pytorch"] = (whole(options.length), 1)
    except ImportError:
        print("performer-pytorch is left out: pip install performer-pytorch")
    found = least(calls, options.rounds)
    for name, ms in found.items():
        print(f"{name:28} {ms:8.3f} ms a byte, {ms / found['favor_np']:7.2f} of favor_np")


if __name__ == "__main__":
    main()
