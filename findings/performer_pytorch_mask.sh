#!/usr/bin/env bash
# performer-pytorch 1.1.4, torch 2.13.0 (CPU), numpy 2.4.6, einops 0.8.2, axial-positional-embedding 0.3.12,
# local-attention 1.11.2, hyper-connections 0.4.11, torch-einops-utils 0.2.0
#
# `mask` sets the values at masked positions to zero and leaves their keys in the denominator. So the
# weights at the kept positions do not add up to 1, and what stands at masked positions changes the
# results at the kept ones.
#
# Seen (all values are 1, so each output is the sum of its weights; four of six positions are kept):
#   without a mask: 1.0000 1.0000 1.0000 1.0000
#   with the mask: 0.4511 0.5240 0.5831 0.6807
#   masked inputs changed: other results at the kept positions
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check performer-pytorch==1.1.4 torch==2.13.0 numpy==2.4.6 einops==0.8.2 axial-positional-embedding==0.3.12 local-attention==1.11.2 hyper-connections==0.4.11 torch-einops-utils==0.2.0

v/bin/python - <<'PYTHON'
import torch
from performer_pytorch import SelfAttention

torch.manual_seed(0)
torch.set_grad_enabled(False)
attention = SelfAttention(16, heads=2, dim_head=8, qkv_bias=True).eval()
attention.to_v.weight.zero_()
attention.to_v.bias.fill_(1.0)
attention.to_out = torch.nn.Identity()
x = torch.randn(1, 6, 16)
mask = torch.tensor([[True, True, True, True, False, False]])
changed = x.clone()
changed[:, 4:] += 1.0

plain = attention(x)[0, :4, 0]
masked = attention(x, mask=mask)[0, :4, 0]
masked_changed = attention(changed, mask=mask)[0, :4, 0]
print("without a mask:", *(f"{value:.4f}" for value in plain.tolist()))
print("with the mask:", *(f"{value:.4f}" for value in masked.tolist()))
differ = bool((masked - masked_changed).abs().max() > 1e-3)
print("masked inputs changed:", "other" if differ else "the same", "results at the kept positions")
assert torch.allclose(plain, torch.ones(4), atol=1e-5)
assert bool((masked < 0.99).all())
assert differ
PYTHON
