"""Dropout whose mask is a function of where it is drawn, never of what else is computed beside it.

The generator is Philox4x32-10 (Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3), which turns a counter
and a key into four 32-bit words. The key is (trial seed, module), the counter (feature block, token in its row, row in
the effective batch, step). So neither other adapters, nor how rows are cut into micro-batches, nor a resume can change
which features are dropped. Knows nothing of adapters. Shapes: T tokens, I features.
"""

import hashlib
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import uint64

from qlora_core.compiled import compiled

_WORDS = 4
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def module_key(seed: int, name: str) -> tuple[int, int]:
    """Two 32-bit words from a trial's seed and a module's name."""
    digest = hashlib.sha256(f"dropout/{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4]), int.from_bytes(digest[4:8])


def dropout_factors(
    tokens: torch.Tensor, rows: torch.Tensor, step: int, key: tuple[int, int], features: int, rate: float
) -> torch.Tensor:
    """[T, I] in float32: 0 where a feature is dropped, 1 / (1 - rate) elsewhere; zero tokens give [0, I].

    `tokens` and `rows` (int64 [T]): each token's place in its row and its row's place in the effective batch.
    A feature is dropped when its word is below rate * 2^32.
    """
    threshold = int(rate * 2**32)
    scale = 1.0 / (1.0 - rate)
    if tokens.device.type == "cpu":
        factors = torch.empty((len(tokens), features), dtype=torch.float32)
        _fill(factors.numpy(), tokens.numpy(), rows.numpy(), step, key[0], key[1], threshold, np.float32(scale))
        return factors
    return _draw(tokens, rows, step, key, features, threshold, scale)


@partial(compiled, inline="always")
def _philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Words and keys are 32-bit values in uint64: numba widens mixed arithmetic, and only so stays typed as meant."""
    low = uint64(0xFFFFFFFF)
    for _ in range(_ROUNDS):
        p0 = uint64(0xD2511F53) * c0
        p1 = uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> uint64(32)) ^ c1 ^ k0, p1 & low, (p0 >> uint64(32)) ^ c3 ^ k1, p0 & low
        k0 = (k0 + uint64(0x9E3779B9)) & low
        k1 = (k1 + uint64(0xBB67AE85)) & low
    return c0, c1, c2, c3


@compiled
def _fill(factors: Any, tokens: Any, rows: Any, step: int, k0: int, k1: int, threshold: int, scale: Any) -> None:
    count, features = factors.shape
    zero = np.float32(0)
    blocks = (features + 3) // 4
    words = np.empty((4, blocks), dtype=np.uint64)
    for place in range(count):
        token, row = uint64(tokens[place]), uint64(rows[place])
        for block in range(blocks):
            w0, w1, w2, w3 = _philox(uint64(block), token, row, uint64(step), uint64(k0), uint64(k1))
            words[0, block] = w0
            words[1, block] = w1
            words[2, block] = w2
            words[3, block] = w3
        for feature in range(features):
            dropped = words[feature & 3, feature >> 2] < uint64(threshold)
            factors[place, feature] = zero if dropped else scale


def philox(counter: list[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Four tensors of 32-bit words, held in int64, from four tensors of counter words of one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def _multiply(factor: int, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a product of 32-bit words; in halves, for int64 has no room for 64 unsigned bits."""
    low = (words & 0xFFFF) * factor
    high = (words >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _draw(
    tokens: torch.Tensor,
    rows: torch.Tensor,
    step: int,
    key: tuple[int, int],
    features: int,
    threshold: int,
    scale: float,
) -> torch.Tensor:
    blocks = torch.arange(-(-features // _WORDS), dtype=torch.int64, device=tokens.device)
    shape = (len(tokens), len(blocks))
    counter = [
        blocks[None].expand(shape),
        tokens[:, None].expand(shape),
        rows[:, None].expand(shape),
        torch.full(shape, step, dtype=torch.int64, device=tokens.device),
    ]
    words = torch.stack(philox(counter, key), dim=-1).flatten(1)[:, :features]
    return (words >= threshold).to(torch.float32) * scale
