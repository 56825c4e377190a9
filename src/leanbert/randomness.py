"""Randomness as a function of position: no state to save, nothing to replay.

Numbers come from SplitMix64's finaliser (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
2014), the order of rows from a Feistel network with it as round function (Black, Rogaway: Ciphers with
Arbitrary Finite Domains, 2002).
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def mix(*words: int | np.ndarray) -> np.ndarray:
    """Hash integers, or arrays of them that broadcast together, to uint64; each argument counts."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = _finalise((state ^ np.asarray(word).astype(np.uint64)) + _GAMMA)
    return state


def uniform(bits: np.ndarray) -> np.ndarray:
    """Turn uint64 hashes into float64 in [0, 1)."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: np.ndarray, size: int, *key: int | np.ndarray) -> np.ndarray:
    """Return where a random order of `range(size)`, one for each `key`, puts `index` (int64, any shape).

    Constant memory and time: an index that the network sends beyond `size` walks on until it is inside.
    """
    half_bits = np.uint64(max(1, -(-max(size - 1, 1).bit_length() // 2)))
    keys = np.broadcast_to(mix(*key), index.shape)
    result = _feistel(index.astype(np.uint64), half_bits, keys)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half_bits, keys[outside])
    return result.astype(np.int64)


def _feistel(value: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (mix(keys, right, number) & mask)
    return (left << half_bits) | right


def _finalise(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))
