"""A training step of favor_np.nn beside its matrix products and attention alone, and beside PyTorch.

    pip install torch      # without it that part is left out
    python tools/training.py --threads 1 --sizes 256x4x4x1024

The model is the same everywhere: bytes, RMSNorm, shifted tokens, rotated queries and keys on
spheres, GELU, tied embedding; forward, backward, clipping and AdamW. In PyTorch attention is
chunked by hand, or exact (SDPA). `--performer-pytorch` adds that package's PerformerLM of the same
sizes, whose step takes many seconds. `--memory` prints instead by how much two steps of either raise the
memory of a process of their own. The calls are interleaved in rounds, and the medians of processor
time printed: what else the machine does shows least in them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PINS = ["FAVOR_NP_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"]
CHUNK = 128


def sizes(text):
    """dim x depth x heads x length x batch [x features]."""
    return tuple(map(int, text.split("x")))


class Step:
    """A step of favor_np.nn."""

    def __init__(self, dim, depth, heads, length, batch, features, **options):
        import numpy as np

        from favor_np import nn

        self.nn, self.count = nn, 0
        self.model = nn.PerformerLM(
            vocab=256, dim=dim, depth=depth, heads=heads, num_features=features, **options
        )
        self.params = self.model.init(np.random.default_rng(0))
        self.optimizer = nn.AdamW(self.params)
        self.tokens = np.random.default_rng(1).integers(0, 256, (batch, length + 1))

    def __call__(self):
        logits, pullback = self.model.vjp(self.params, self.tokens[:, :-1], key=(0, self.count))
        loss, grad = self.nn.cross_entropy(logits, self.tokens[:, 1:])
        pullback(grad, self.optimizer.grads)
        self.optimizer.step(1e-3, clip=1.0)
        self.count += 1
        return loss


def alone(dim, depth, heads, length, batch, features):
    """What multiplies the matrices of a step, and what attends: nothing else."""
    import numpy as np

    import favor_np

    rng, rows = np.random.default_rng(0), length * batch
    shapes = [(dim, 3 * dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim)] * depth + [(dim, 256)]
    sets = {}
    for inputs, outputs in set(shapes):
        x, g = rng.standard_normal((rows, inputs), np.float32), np.ones((rows, outputs), np.float32)
        w = rng.standard_normal((outputs, inputs), np.float32)
        sets[inputs, outputs] = x, g, w, np.empty_like(g), np.empty_like(w), np.empty_like(x)

    def products():
        for shape in shapes:
            x, g, w, y, dw, dx = sets[shape]
            np.matmul(x, w.T, out=y)
            np.matmul(g.T, x, out=dw)
            np.matmul(g, w, out=dx)

    d = dim // heads
    fm = favor_np.feature_map("positive", d, features, scale=1.0)
    q, k, v = rng.standard_normal((3, batch, heads, length, d), np.float32) / d**0.5

    def attention():
        for _ in range(depth):
            out, pullback = favor_np.favor_attention_vjp(q, k, v, fm, causal=True)
            pullback(out)

    return {"products": products, "attention": attention}


def torch_step(dim, depth, heads, length, batch, features, exact, compiled=False):
    """The same in PyTorch, as one would write it for speed."""
    import torch

    F = torch.nn.functional
    torch.manual_seed(0)
    d = dim // heads

    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(dim))

        def forward(self, x):
            return F.rms_norm(x, (dim,), self.weight, 1e-6)

    angle = torch.arange(length)[:, None] * 1e4 ** (-torch.arange(0, d, 2) / d)
    cos, sin = angle.cos(), angle.sin()
    mask = torch.ones(CHUNK, CHUNK).tril()

    def rotate(x):
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    def shift(x):
        half = dim // 2
        return torch.cat([x[..., :half], F.pad(x[..., half:], (0, 0, 1, -1))], -1)

    def chunked(q, k, v, w):
        size = min(CHUNK, length)
        phi_q, phi_k = ((t @ w.T) for t in (q, k))
        phi_q, phi_k = (torch.cat([t, -t], -1).exp() for t in (phi_q, phi_k))
        phi_q, phi_k, v = (t.unflatten(2, (-1, size)) for t in (phi_q, phi_k, v))
        v = F.pad(v, (0, 1), value=1.0)
        state = phi_k.mT @ v
        before = state.cumsum(2) - state
        found = (phi_q @ phi_k.mT * mask[:size, :size]) @ v + phi_q @ before
        return (found[..., :-1] / found[..., -1:]).flatten(2, 3)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Norm(), Norm()
            self.qkv = torch.nn.Linear(dim, 3 * dim, bias=False)
            self.out = torch.nn.Linear(dim, dim, bias=False)
            self.up = torch.nn.Linear(dim, 4 * dim, bias=False)
            self.down = torch.nn.Linear(4 * dim, dim, bias=False)
            self.radius = torch.nn.Parameter(torch.zeros(heads))
            self.register_buffer("w", torch.randn(features // 2, d))

        def forward(self, x):
            y = self.qkv(shift(self.one(x))).unflatten(-1, (3 * heads, d)).transpose(1, 2)
            q, k, v = y.chunk(3, 1)
            scale = (2 * torch.sigmoid(self.radius)).sqrt()[:, None, None]
            q, k = (rotate(F.normalize(t, dim=-1) * scale) for t in (q, k))
            if exact:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
            else:
                out = chunked(q, k, v, self.w)
            x = x + self.out(out.transpose(1, 2).flatten(-2))
            return x + self.down(F.gelu(self.up(shift(self.two(x)))))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(256, dim)
            self.blocks = torch.nn.ModuleList([Block() for _ in range(depth)])
            self.norm = Norm()

        def forward(self, tokens):
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x)
            return self.norm(x) @ self.embedding.weight.T

    model = Model()
    run = torch.compile(model) if compiled else model
    return learning(run, list(model.parameters()), torch.randint(0, 256, (batch, length + 1)))


def learning(run, parameters, tokens):
    """Return a step of a model in PyTorch: forward, backward, clipping, AdamW."""
    import torch

    optimizer = torch.optim.AdamW(parameters, 1e-3, (0.9, 0.95), fused=True)

    def step():
        logits = run(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def package_step(dim, depth, heads, length, batch, features):
    """The same by performer-pytorch."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from performer_pytorch import PerformerLM

        model = PerformerLM(
            num_tokens=256, max_seq_len=length, dim=dim, depth=depth, heads=heads,
            dim_head=dim // heads, nb_features=features, causal=True, shift_tokens=True, tie_embed=True,
        )  # fmt: skip
    return learning(model, list(model.parameters()), torch.randint(0, 256, (batch, length + 1)))


def measure(calls, rounds):
    """Return processor and wall time of each call, in milliseconds, medians of rounds."""
    taken = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.15)  # the threads of the one before fall asleep
            call()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: [1e3 * statistics.median(each) for each in zip(*times, strict=True)]
        for name, times in taken.items()
    }


def peak(make, own):
    """Return how many MB more this process has at the peak of two steps than before them (Linux)."""
    step = make(*own)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins with what is there now

    def most():
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024

    before = most()
    step(), step()
    return most() - before


def report_memory(size):
    """Print the memory of a step of favor_np and of performer-pytorch, each in a new process."""
    import multiprocessing

    dim, depth, heads, length, batch, *features = size
    own = (dim, depth, heads, length, batch, *(features or [128]))
    found = []
    for make in (Step, package_step):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(peak, (make, own)))
        name = "favor_np" if make is Step else "performer-pytorch"
        print(f"{name:28} {found[-1]:8.0f} MB, {found[-1] / found[0]:6.2f} of favor_np", flush=True)


def report(size, options, torch):
    """Measure one size, and print a line for each call."""
    dim, depth, heads, length, batch, *features = size
    own = (dim, depth, heads, length, batch, *(features or [128]))
    calls = {
        "favor_np": Step(*own),
        "favor_np, exact attention": Step(*own, exact=True),
        **alone(*own),
    }
    if torch:
        calls["PyTorch, chunked FAVOR+"] = torch_step(*own, exact=False)
        calls["PyTorch, SDPA"] = torch_step(*own, exact=True)
        if options.compile:
            calls["PyTorch, compiled FAVOR+"] = torch_step(*own, exact=False, compiled=True)
        if options.performer_pytorch:
            calls["performer-pytorch"] = package_step(*own)
    found = measure(calls, options.rounds)
    base = found["products"][0] + found["attention"][0]
    print(f"\ndim {dim}, {depth} layers, {heads} heads, {batch} x {length}, m = {own[-1]}")
    for name, (cpu, wall) in found.items():
        print(
            f"{name:28} {cpu:8.1f} ms of processors, {wall:8.1f} ms, "
            f"{cpu / base:5.2f} of products and attention, "
            f"{cpu / found['favor_np'][0]:5.2f} of favor_np, {cpu / wall:4.2f} processors",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", type=sizes, nargs="+", default=[
        (256, 4, 4, 1024, 4), (256, 4, 4, 4096, 1), (64, 2, 2, 512, 8, 64), (64, 2, 2, 128, 16, 64),
    ], metavar="DIMxDEPTHxHEADSxLENGTHxBATCH[xFEATURES]")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    parser.add_argument("--performer-pytorch", action="store_true", help="the package, too")
    parser.add_argument("--memory", action="store_true", help="memory beside performer-pytorch's")
    options = parser.parse_args()
    if os.environ.get(PINS[0]) != str(options.threads):  # read before NumPy loads
        pins = dict.fromkeys(PINS, str(options.threads))
        sys.exit(subprocess.call([sys.executable, *sys.argv], env=os.environ | pins))
    torch = not options.no_torch
    if torch:
        try:
            import torch as library
        except ImportError:
            print("PyTorch is left out: pip install torch")
            torch = False
        else:
            library.set_num_threads(options.threads)
    for size in options.sizes:
        if options.memory:
            report_memory(size)
        else:
            report(size, options, torch)


if __name__ == "__main__":
    main()
