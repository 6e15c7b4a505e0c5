#!/usr/bin/env bash
# Compiled kernels, tests, benchmarks and compute-sanitizer on a machine with an NVIDIA GPU, and a
# log of it.
#
#   tools/gpu_check.sh [log]        default: gpu_check.log
#
# Needs Python 3.11 or newer ($PYTHON, default python3) with numba and numba-cuda; no network, and
# nothing is installed. pytest, compute-sanitizer, PyTorch and fla are used where they are there.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
log=${1:-gpu_check.log}
export PYTHONPATH=$PWD:$PWD/tests:$PWD/tests/cuda FAVOR_NP_REQUIRE_GPU=1
unset NUMBA_ENABLE_CUDASIM FAVOR_NP_STUB_GPU
failed=0
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

step() {
  printf '\n=== %s (%d s)\n' "$1" "$SECONDS"
  shift
  echo "\$ $*"
  "$@" || { echo "FAILED ($?): $*"; failed=1; }
}

main() {
  date --utc
  git rev-parse HEAD 2>/dev/null
  nvidia-smi || true # a container may lack it
  step "Python" "$python" -VV
  step "Installation" "$python" -m favor_np.cli info
  step "A GPU is there" "$python" -c \
    'import sys; from favor_np.cuda import device; sys.exit(device.problem())'
  [ "$failed" = 0 ] || { echo "no GPU that can be used: see above"; return 1; }

  step "Kernels are compiled, and kept" "$python" -m favor_np.cli warmup --device cuda
  step "Another process finds them" "$python" -m favor_np.cli warmup --device cuda
  step "Installation" "$python" -m favor_np.cli info
  step "Products of bfloat16" "$python" tests/gpu/plain.py bfloat16
  step "How long they take" "$python" tools/gpu.py bfloat16

  if "$python" -c 'import pytest' 2>/dev/null; then
    # not the whole suite's settings: they need packages that may not be here
    step "Tests" "$python" -m pytest -c /dev/null --rootdir . --confcutdir tests/gpu -q -ra \
      -p no:cacheprovider tests/gpu
  else
    echo "pytest is not installed: the case table alone"
    step "Tests" "$python" tests/gpu/plain.py
  fi

  step "Benchmarks" "$python" tools/gpu.py

  if command -v compute-sanitizer >/dev/null; then
    for case in masked causal-131 weighed-antithetic steps; do
      for tool in memcheck racecheck initcheck synccheck; do # side by side, as each is slow to begin
        step "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
          "$python" tests/gpu/plain.py "$case" >"$folder/$tool" 2>&1 &
      done
      wait
      for tool in memcheck racecheck initcheck synccheck; do
        cat "$folder/$tool"
        ! grep -q '^FAILED' "$folder/$tool" || failed=1
      done
    done
  else
    echo "compute-sanitizer is not installed: no check of races on the GPU"
  fi

  printf '\n=== %s (%d s)\n' "$([ "$failed" = 0 ] && echo "All passed" || echo "FAILED")" "$SECONDS"
  return "$failed"
}

main 2>&1 | tee "$log"
exit "${PIPESTATUS[0]}"
