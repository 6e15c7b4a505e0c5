"""Queries and keys of a trained performer-pytorch model, for `favor-np compare --data`.

    pip install safetensors
    python tools/activations.py MODEL OUT.npz     # MODEL.safetensors, MODEL.json, MODEL.npz
    favor-np compare --data OUT.npz --causal --lengths 64

MODEL is a causal PerformerLM of characters, softmax kernel: its weights, its configuration with
the vocabulary, and some tokens with the logits that performer-pytorch computed from them in
float64, which the forward pass below has to reproduce.  It then reads text that the model was not
trained on, the end of `pydoc_data.topics`; the queries and keys of all layers and heads are heads
of OUT.npz.  What maps may know comes from the text before.
"""

import argparse
import json
import math
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from safetensors.numpy import load_file
from scipy.special import erf

KNOWN = 2  # sequences for calibration
FEATURE_EPS, DENOMINATOR_EPS = 1e-4, 1e-6  # which the model was trained with


def forward(weights, config, tokens):
    """Logits (n, vocabulary), and queries and keys (layers * heads, n, d) of one sequence."""
    n, heads = len(tokens), config["heads"]
    rotary = config["rotary_position_emb"]
    positions = weights["pos_emb.emb" if rotary else "pos_emb.emb.weight"]
    x = weights["token_emb.weight"][tokens] + positions[:n]
    queries, keys = [], []
    for layer in range(config["depth"]):
        part = f"performer.net.layers.{layer}"
        y = norm(x, weights, f"{part}.0.norm")
        q, k, v = (
            (y @ weights[f"{part}.0.fn.to_{name}.weight"].T).reshape(n, heads, -1).swapaxes(0, 1)
            for name in "qkv"
        )
        if rotary:
            q, k = (rotate(z, weights["layer_pos_emb.emb"][:n]) for z in (q, k))
        rows = weights[f"{part}.0.fn.fast_attention.projection_matrix"]
        out = attention(q, k, v, rows).swapaxes(0, 1).reshape(n, -1)
        x = x + out @ weights[f"{part}.0.fn.to_out.weight"].T
        y = norm(x, weights, f"{part}.1.norm")
        y = y @ weights[f"{part}.1.fn.fn.w1.weight"].T + weights[f"{part}.1.fn.fn.w1.bias"]
        y = 0.5 * y * (1 + erf(y / math.sqrt(2)))
        x = x + y @ weights[f"{part}.1.fn.fn.w2.weight"].T + weights[f"{part}.1.fn.fn.w2.bias"]
        queries.append(q)
        keys.append(k)
    x = norm(x, weights, "norm")
    if config["tie_embed"]:
        logits = x @ weights["token_emb.weight"].T
    else:
        logits = x @ weights["to_out.weight"].T + weights["to_out.bias"]
    return logits, np.concatenate(queries), np.concatenate(keys)


def norm(x, weights, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def rotate(x, angles):
    sin, cos = (np.repeat(part, 2, axis=-1) for part in np.split(angles, 2, axis=-1))
    turned = np.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    return x * cos + turned * sin


def attention(q, k, v, rows):
    """Causal FAVOR+ as the model was trained: with epsilons, and a maximum over all keys."""
    phi_q, phi_k = (
        (np.exp(y - h - y.max(axes, keepdims=True)) + FEATURE_EPS) / math.sqrt(len(rows))
        for y, h, axes in ((*logs(q, rows), -1), (*logs(k, rows), (-2, -1)))
    )
    den = np.sum(phi_q * (phi_k.cumsum(-2) + DENOMINATOR_EPS), axis=-1, keepdims=True)
    return np.tril(phi_q @ phi_k.swapaxes(-1, -2)) @ v / den


def logs(x, rows):
    x = x * x.shape[-1] ** -0.25
    return x @ rows.T, 0.5 * np.sum(x * x, axis=-1, keepdims=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="path of the model, without a suffix")
    parser.add_argument("out", help="the .npz file to write")
    options = parser.parse_args()
    weights = {n: w.astype(float) for n, w in load_file(f"{options.model}.safetensors").items()}
    description = json.loads(Path(f"{options.model}.json").read_text(encoding="utf-8"))
    config, vocabulary = description["kwargs"], description["vocab"]
    with np.load(f"{options.model}.npz", allow_pickle=False) as stored:
        for tokens, logits in zip(stored["tokens"], stored["logits_f64"], strict=True):
            difference = np.abs(forward(weights, config, tokens)[0] - logits).max()
            if difference > 1e-12:
                raise SystemExit(f"logits differ by {difference:.1g} from performer-pytorch's")
    length = config["max_seq_len"]
    text = "\n".join(topics.values())[-(KNOWN + 1) * length :]
    numbers = {character: number for number, character in enumerate(vocabulary)}
    tokens = [numbers.get(character, 0) for character in text]
    parts = [
        forward(weights, config, np.array(tokens[start : start + length]))[1:]
        for start in range(0, len(tokens), length)
    ]
    known_q, known_k = (np.concatenate(x, axis=1) for x in zip(*parts[:-1], strict=True))
    q, k = parts[-1]
    np.savez(options.out, q=q, k=k, known_q=known_q, known_k=known_k)
    s = np.sum((q[:, :, None] + k[:, None]) ** 2, axis=-1) / math.sqrt(q.shape[-1])
    print(
        f"{options.out}: {q.shape[0]} heads, L = {length}, d = {q.shape[-1]}; s = |x + y|² by head:"
    )
    print(" ".join(f"{mean:.1f}" for mean in s.mean((1, 2))))


if __name__ == "__main__":
    main()
