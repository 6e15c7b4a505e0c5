"""Matrices of bfloat16 in pairs, made outside kernels: see ``kernels.bfloat16``."""

from __future__ import annotations

from typing import Any

import numpy as np

from favor_np.cpu.tiles import PARTS, pairs_for

#: The operand of LDTILECFG: palette 1, eight tiles of 16 rows of 64 bytes.
TILE_CONFIG = np.zeros(64, np.uint8)
TILE_CONFIG[0] = 1
TILE_CONFIG[16:32:2] = 64
TILE_CONFIG[48:56] = 16


def _numbers(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the matrix in float32, its rows filled up with zeros to whole steps."""
    columns = matrix.shape[-1]
    padding = [(0, 0)] * (matrix.ndim - 1) + [(0, 2 * pairs_for(columns) - columns)]
    return np.pad(np.asarray(matrix, np.float32), padding)


def _pairs(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the pairs of the upper halves of numbers, along the last axis."""
    pairs = (bits[..., 0::2] >> 16) | (bits[..., 1::2] & np.uint32(0xFFFF0000))
    return np.asarray(pairs.view(np.float32))


def pairs_of(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the rows of a matrix, or of many, as left factors: outside kernels."""
    return _pairs(_numbers(matrix).view(np.uint32) + np.uint32(0x8000))


def parts_of(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same, split into three parts."""
    rest, found = _numbers(matrix), []
    for _ in range(PARTS):
        bits = rest.view(np.uint32)
        found.append(_pairs(bits))
        rest = rest - (bits & np.uint32(0xFFFF0000)).view(np.float32)
    return np.concatenate(found, axis=-1)
