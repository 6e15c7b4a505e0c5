"""What `peers.py` times: one problem, and how other libraries compute it on a CPU.

A peer takes a `Case` and returns ``{name: call}``, the forms in which it may compute it: the fastest
is the one compared. One that is not installed raises ImportError.
"""

import contextlib
import ctypes
import dataclasses
import functools
import io
import itertools
import shutil
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

import favor_np

HEADS, DIM, FEATURES, WINDOW = 4, 64, 256, 256
CHUNKS = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: what to compute, from what."""

    task: str
    length: int
    threads: int

    @property
    def causal(self):
        return self.task.startswith("causal")

    @property
    def window(self):
        return WINDOW if "window" in self.task else None

    @functools.cached_property
    def arrays(self):
        """Queries, keys and values (1, HEADS, length, DIM), float32."""
        rng = np.random.default_rng(0)
        shape = (1, HEADS, self.length, DIM)
        return [s * rng.standard_normal(shape, np.float32) for s in (0.35, 0.35, 1.0)]

    @functools.cached_property
    def projection(self):
        return favor_np.sample_projection(FEATURES, DIM, rng=0).astype(np.float32)

    @property
    def weight(self):
        """The projection with the scale in it: features are exp(weight @ x - ...)."""
        return self.projection * np.float32(DIM**-0.25)

    @property
    def operations(self):
        """Useful operations: 64 positions of a causal chunk are counted, whatever a peer takes."""
        if "exact" in self.task:
            token = 4 * self.length * DIM // (2 if self.causal else 1)
            if self.window is not None:
                token = 4 * min(self.window, self.length) * DIM
        else:
            token = 8 * DIM * FEATURES + (64 * (FEATURES + DIM) if self.causal else 0)
        if "gradient" in self.task:  # 4 times the products of chunks, 22 more of the projections
            token = 30 * DIM * FEATURES + 4 * 64 * (FEATURES + DIM)
        return HEADS * self.length * token

    def favor(self, projection, antithetic, precision="full"):
        fm = favor_np.FeatureMap.from_projection(projection, antithetic=antithetic)
        q, k, v = self.arrays
        return lambda: favor_np.favor_attention(
            q, k, v, fm, causal=self.causal, precision=precision, num_threads=self.threads
        )

    @functools.cached_property
    def cotangent(self):
        """Of the result, (1, HEADS, length, DIM), float32."""
        shape = (1, HEADS, self.length, DIM)
        return np.random.default_rng(1).standard_normal(shape, np.float32)

    def gradient(self, projection, antithetic):
        """Forward and backward: gradients of queries, keys and values, one after another."""
        fm = favor_np.FeatureMap.from_projection(projection, antithetic=antithetic)
        q, k, v = self.arrays

        def run():
            _, pullback = favor_np.favor_attention_vjp(
                q, k, v, fm, causal=True, num_threads=self.threads
            )
            grads = pullback(self.cotangent)
            return np.stack([grads.q, grads.k, grads.v])

        return run

    def exact(self, precision="full"):
        q, k, v = self.arrays
        return lambda: favor_np.exact_attention(
            q, k, v, causal=self.causal, window=self.window, precision=precision,
            num_threads=self.threads,
        )  # fmt: skip


@functools.cache
def jax_attend():
    """FAVOR+ as an expert writes it: features inside the scan, a running maximum a head."""
    import jax
    import jax.numpy as jnp

    constant = jax.lax.stop_gradient  # maxima cancel: their gradient is nothing

    def attend(q, k, v, weight, chunk, causal, again=False):  # (heads, length, DIM), (length, DIM)
        lead, m = q.shape[:-2], len(weight)

        def query(q):
            y = q @ weight.T
            return jnp.exp(y - constant(y.max(-1, keepdims=True)))

        def rescale(state, k):
            s, z, top = state
            y = k @ weight.T - 0.5 * DIM**-0.5 * (k * k).sum(-1, keepdims=True)
            new = constant(jnp.maximum(top, y.max((-1, -2), keepdims=True)))
            ratio = jnp.exp(top - new)
            return jnp.exp(y - new), s * ratio, z * ratio[..., 0], new

        def fold(state, kv):
            k, v = kv
            phi, s, z, top = rescale(state, k)
            return (s + phi.mT @ v, z + phi.sum(-2), top), None

        def read(state, q):
            s, z, _ = state
            phi = query(q)
            return phi @ s / jnp.einsum("...cm,...m->...c", phi, z)[..., None]

        def fold_and_read(state, qkv):
            q, k, v = qkv
            phi_q = query(q)
            phi_k, s, z, top = rescale(state, k)
            scores = jnp.where(jnp.tri(chunk, dtype=bool), phi_q @ phi_k.mT, 0)
            total = scores.sum(-1) + jnp.einsum("...cm,...m->...c", phi_q, z)
            out = (scores @ v + phi_q @ s) / total[..., None]
            return (s + phi_k.mT @ v, z + phi_k.sum(-2), top), out

        q, k, v = (jnp.moveaxis(x.reshape(*lead, -1, chunk, DIM), -3, 0) for x in (q, k, v))
        state = jnp.zeros((*lead, m, DIM)), jnp.zeros((*lead, m)), jnp.full((*lead, 1, 1), -jnp.inf)
        if causal:
            step = jax.checkpoint(fold_and_read) if again else fold_and_read
            out = jax.lax.scan(step, state, (q, k, v))[1]
        else:
            state = jax.lax.scan(fold, state, (k, v))[0]
            out = jax.lax.map(functools.partial(read, state), q)
        return jnp.moveaxis(out, 0, -3).reshape(*lead, -1, DIM)

    options = ("chunk", "causal", "apart", "again")

    @functools.partial(jax.jit, static_argnames=options)
    def attend_heads(q, k, v, weight, chunk, causal, apart, again=False):
        run = functools.partial(attend, weight=weight, chunk=chunk, causal=causal, again=again)
        qkv = q[0], k[0], v[0]
        return (jax.lax.map(lambda head: run(*head), qkv) if apart else run(*qkv))[None]

    @functools.partial(jax.jit, static_argnames=options)
    def gradient_heads(q, k, v, weight, cotangent, **form):
        def loss(q, k, v):
            return (attend_heads(q, k, v, weight, **form) * cotangent).sum()

        value, grads = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
        return value, jnp.stack(grads)

    return attend_heads, gradient_heads


def forms(name, run):
    """The forms a peer may take: all heads in one product, or a head at a time."""
    return {
        f"{name}, C = {chunk}{', by head' if apart else ''}": functools.partial(run, chunk, apart)
        for chunk, apart in itertools.product(CHUNKS, (False, True))
    }


def jax_peer(case):
    import jax.numpy as jnp

    arrays, attend = [jnp.asarray(x) for x in (*case.arrays, case.weight)], jax_attend()[0]
    return forms("JAX", lambda chunk, apart: attend(
        *arrays, chunk=chunk, causal=case.causal, apart=apart).block_until_ready())  # fmt: skip


def jax_gradient_peer(case):
    """value_and_grad of the same, with jax.checkpoint around a chunk and without."""
    import jax.numpy as jnp

    arrays, gradient = (*case.arrays, case.weight, case.cotangent), jax_attend()[1]
    arrays = [jnp.asarray(x) for x in arrays]
    found = {}
    for again in (False, True):
        name = "JAX, checkpoint" if again else "JAX"
        found |= forms(name, lambda chunk, apart, again=again: gradient(
            *arrays, chunk=chunk, causal=True, apart=apart, again=again)[1].block_until_ready())  # fmt: skip
    return found


def torch_attend(q, k, v, weight, chunk, causal):
    """The same algorithm as JAX's, (heads, length, DIM), with what can be done in place so done."""
    import torch

    s, z = q.new_zeros(len(q), len(weight), DIM), q.new_zeros(len(q), len(weight), 1)
    top, out = q.new_full((len(q), 1, 1), -torch.inf), torch.empty_like(v)
    parts = [slice(i, i + chunk) for i in range(0, q.shape[1], chunk)]

    def read(part, phi_k):
        y = q[:, part] @ weight.T
        phi = y.sub_(y.amax(-1, keepdim=True)).exp_()
        if phi_k is None:
            torch.div(phi @ s, phi @ z, out=out[:, part])
        else:
            scores = (phi @ phi_k.mT).tril_()
            total = scores.sum(-1, keepdim=True).baddbmm_(phi, z)
            torch.div((scores @ v[:, part]).baddbmm_(phi, s), total, out=out[:, part])

    for part in parts:
        keys = k[:, part]
        y = (keys @ weight.T).sub_(0.5 * DIM**-0.5 * (keys * keys).sum(-1, keepdim=True))
        new = torch.maximum(top, y.amax((-1, -2), keepdim=True))
        ratio, top = torch.exp(top - new), new
        s, z, phi_k = s.mul_(ratio), z.mul_(ratio), y.sub_(new).exp_()
        if causal:
            read(part, phi_k)
        s.baddbmm_(phi_k.mT, v[:, part])
        z.add_(phi_k.sum(1).unsqueeze(-1))
    if not causal:
        for part in parts:
            read(part, None)
    return out


def torch_peer(case):
    import torch

    torch.set_num_threads(case.threads)
    q, k, v, weight = (torch.from_numpy(x) for x in (*case.arrays, case.weight))

    def run(chunk, apart):
        with torch.inference_mode():
            heads = [slice(h, h + 1) for h in range(HEADS)] if apart else [slice(None)]
            parts = [torch_attend(q[0, h], k[0, h], v[0, h], weight, chunk, case.causal)
                     for h in heads]  # fmt: skip
            return (torch.cat(parts) if apart else parts[0])[None]

    return forms("PyTorch", run)


def torch_gradient_peer(case):
    """The same chunks by autograd, which allows nothing in place."""
    import torch

    torch.set_num_threads(case.threads)
    arrays = [torch.from_numpy(x[0]).clone().requires_grad_() for x in case.arrays]
    weight, cotangent = torch.from_numpy(case.weight), torch.from_numpy(case.cotangent[0])

    def attend(q, k, v, chunk):
        s, z, outs = q.new_zeros(len(q), len(weight), DIM), q.new_zeros(len(q), len(weight), 1), []
        top = q.new_full((len(q), 1, 1), -torch.inf)
        for i in range(0, q.shape[1], chunk):
            query, key, value = (x[:, i : i + chunk] for x in (q, k, v))
            y = key @ weight.T - 0.5 * DIM**-0.5 * (key * key).sum(-1, keepdim=True)
            new = torch.maximum(top, y.detach().amax((-1, -2), keepdim=True))
            ratio, top = torch.exp(top - new), new
            s, z, phi_k = s * ratio, z * ratio, torch.exp(y - new)
            y = query @ weight.T
            phi = torch.exp(y - y.detach().amax(-1, keepdim=True))
            scores = (phi @ phi_k.mT).tril()
            outs.append((scores @ value + phi @ s) / (scores.sum(-1, keepdim=True) + phi @ z))
            s, z = s + phi_k.mT @ value, z + phi_k.sum(1).unsqueeze(-1)
        return torch.cat(outs, 1)

    def run(chunk, apart):
        heads = [slice(h, h + 1) for h in range(HEADS)] if apart else [slice(None)]
        for x in arrays:
            x.grad = None
        for h in heads:
            attend(*(x[h] for x in arrays), chunk).backward(cotangent[h])
        return torch.stack([x.grad[None] for x in arrays])

    return forms("PyTorch autograd", run)


CAUSAL_PRODUCT = """
extern "C" void causal_product(const float *q, const float *k, const float *v, float *out,
                               float *state, long heads, long length, long m, long d) {
  #pragma omp parallel for
  for (long h = 0; h < heads; ++h) {
    float *s = state + h * m * d;
    for (long i = 0; i < m * d; ++i) s[i] = 0;
    for (long t = h * length; t < (h + 1) * length; ++t) {
      for (long i = 0; i < m; ++i)
        for (long j = 0; j < d; ++j) s[i * d + j] += k[t * m + i] * v[t * d + j];
      for (long j = 0; j < d; ++j) out[t * d + j] = 0;
      for (long i = 0; i < m; ++i)
        for (long j = 0; j < d; ++j) out[t * d + j] += q[t * m + i] * s[i * d + j];
    }
  }
}
"""


@functools.cache
def causal_product():
    """The position by position loop that libraries of linear attention ship, in C++."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise ImportError("no C++ compiler; install g++")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "product.cpp"), Path(folder, "product.so")
        source.write_text(CAUSAL_PRODUCT)
        options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run([compiler, *options, source, "-o", library], check=True)
        return ctypes.CDLL(str(library)).causal_product


def cpp_peer(case):
    import torch

    if not case.causal:
        return {}
    product, weight = causal_product(), torch.from_numpy(case.weight)
    q, k, v = (torch.from_numpy(x) for x in case.arrays)
    sizes = [ctypes.c_long(n) for n in (HEADS, case.length, FEATURES, DIM)]

    def run():
        with torch.inference_mode():
            y = q @ weight.T
            phi_q = y.sub_(y.amax(-1, keepdim=True)).exp_()
            y = (k @ weight.T).sub_(0.5 * DIM**-0.5 * (k * k).sum(-1, keepdim=True))
            phi_k = y.sub_(y.amax((-1, -2), keepdim=True)).exp_()
            out, state = torch.empty_like(v), torch.empty(HEADS, FEATURES, DIM)
            pointers = [ctypes.c_void_p(x.data_ptr()) for x in (phi_q, phi_k, v, out, state)]
            product(*pointers, *sizes)
            return out.div_((phi_q * phi_k.cumsum(-2)).sum(-1, keepdim=True))

    return {"PyTorch features, C++ loop": run}


def performer_peer(case):
    """FastAttention as it is, but for its two eps = 0: with them it computes something else."""
    import torch
    from performer_pytorch import performer_pytorch as module

    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has no CUDA
        attention = module.FastAttention(DIM, FEATURES, causal=case.causal)
    if case.causal:
        attention.causal_linear_fn = functools.partial(attention.causal_linear_fn, eps=0)
    attention.projection_matrix.copy_(torch.from_numpy(case.projection))
    arrays = [torch.from_numpy(x) for x in case.arrays]
    kernel = functools.partial(module.softmax_kernel, eps=0)

    def run():
        with torch.inference_mode(), mock.patch.object(module, "softmax_kernel", kernel):
            return attention(*arrays)

    return {"performer-pytorch": run}


def sdpa_call(case, dtype):
    """SDPA of arrays of a dtype; a window is a mask of a band."""
    import torch

    torch.set_num_threads(case.threads)
    q, k, v = (torch.from_numpy(x).to(dtype) for x in case.arrays)
    options = {"is_causal": case.causal}
    if case.window is not None:
        back = torch.arange(case.length)[:, None] - torch.arange(case.length)
        options = {"attn_mask": (back >= 0) & (back < case.window)}

    def run():
        with torch.inference_mode():
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(q, k, v, **options).float()

    return run


def sdpa_peer(case):
    import torch

    return {"PyTorch SDPA": sdpa_call(case, torch.float32)}


def sdpa_bfloat16_peer(case):
    import torch

    return {"PyTorch SDPA of bfloat16": sdpa_call(case, torch.bfloat16)}


PEERS = {  # name: (what makes its calls, what to install, for which tasks)
    "JAX": (jax_peer, "jax jaxlib", "favor"),
    "PyTorch": (torch_peer, "torch", "favor"),
    "C++": (cpp_peer, "torch", "favor"),
    "performer-pytorch": (performer_peer, "torch performer-pytorch", "favor"),
    "JAX gradient": (jax_gradient_peer, "jax jaxlib", "gradient"),
    "PyTorch gradient": (torch_gradient_peer, "torch", "gradient"),
    "SDPA": (sdpa_peer, "torch", "exact"),
    "SDPA, bfloat16": (sdpa_bfloat16_peer, "torch", "exact"),
}
