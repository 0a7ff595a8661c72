"""Random numbers as a function of position: Philox 4×32-10 in integer torch arithmetic.

A draw is addressed by (seed, stream, step, layer, token, round), never by call order or rank, so that sampled routing and
initialisation are the same under every parallel layout, micro-batch size, recomputation and resume.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC'11), and its published known-answer vectors.

Shape suffixes: N numbers addressed, W = 4 words of one Philox block.
"""

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MUL_A, _MUL_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
# Words are made in blocks of this many counters: the int64 temporaries stay in a CPU core's cache; on a GPU the 250 launches a
# block are what takes time, 32 MB each temporary (full width: 2.7e9 numbers in 10,000 small blocks were 2.6 million launches).
_CHUNK, _CHUNK_GPU = 1 << 16, 1 << 22


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b for 32-bit operands held in int64; the product is split so that int64 never overflows."""
    a_hi, a_lo = a >> 16, a & 0xFFFF
    low = a_lo * b  # < 2^48
    mid = a_hi * b + (low >> 16)  # < 2^49
    return mid >> 16, ((mid << 16) & _MASK) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4×32-10.

    Args:
        counter: four int64 tensors that broadcast against each other, each holding values in [0, 2^32).
        key: two integers in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape, each holding values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        hi_a, lo_a = _mul_hi_lo(_MUL_A, c0)
        hi_b, lo_b = _mul_hi_lo(_MUL_B, c2)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0, k1 = (k0 + _WEYL_A) & _MASK, (k1 + _WEYL_B) & _MASK
    return c0, c1, c2, c3


def seed_key(seed: int) -> tuple[int, int]:
    """The Philox key of a run seed: its low and high 32 bits.

    Raises:
        ValueError: the seed does not fit in 64 unsigned bits.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: {seed} must lie in [0, 2^64)")
    return seed & _MASK, seed >> 32


def routing_words(seed: int, step: int, layer: int, token_T: Tensor, blocks: int) -> Tensor:
    """Random words for the router's draws.

    The counter is (token low, token high bits and block, layer, step), the key is the run seed. A block of four words serves
    two rounds of sampling: (expert, Bernoulli) each.

    Args:
        seed: run seed, [0, 2^64).
        step: optimizer step, [0, 2^32).
        layer: layer index counted over the whole model, [0, 2^32).
        token_T: int64, index of each token in the global batch of the step, [0, 2^48).
        blocks: Philox blocks per token, at most 65536.

    Returns:
        int64 (T, blocks·4), values in [0, 2^32).
    """
    low_T1 = (token_T & _MASK).unsqueeze(1)
    high_T1 = (token_T >> 32).unsqueeze(1)
    block_B = torch.arange(blocks, device=token_T.device, dtype=torch.int64)
    second_TB = high_T1 | (block_B << 16)
    zero = torch.zeros((), device=token_T.device, dtype=torch.int64)
    words = philox((low_T1.expand_as(second_TB), second_TB, zero + layer, zero + step), seed_key(seed))
    return torch.stack(words, dim=-1).flatten(1)


def uniform(words: Tensor) -> Tensor:
    """Uniform fp32 numbers in the open interval (0, 1) from 32-bit words: ((word >> 9) + 0.5) · 2^-23, exact in fp32."""
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23


def stream_key(seed: int, name: str) -> tuple[int, int]:
    """A Philox key of its own for a named stream (a parameter's initialisation): from SHA-256 of seed and name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def normal_run(start: int, count: int, key: tuple[int, int], device: torch.device) -> Tensor:
    """Standard normal fp32 numbers for the consecutive indices [start, start + count): Box–Muller, four to a Philox block.

    Args:
        start: first index, [0, 2^62).
        count: how many.
        key: from `stream_key`.
        device: where to compute.

    Returns:
        fp32 (count,); an index gives the same number in every call, on every rank.
    """
    first_block, end_block = start >> 2, (start + count + 3) >> 2
    out_N = torch.empty((end_block - first_block) * 4, dtype=torch.float32, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    chunk = _CHUNK if torch.device(device).type == "cpu" else _CHUNK_GPU
    for block in range(first_block, end_block, chunk):
        block_N = torch.arange(block, min(block + chunk, end_block), dtype=torch.int64, device=device)
        words_N4 = torch.stack(philox((block_N & _MASK, block_N >> 32, zero, zero), key), dim=-1)
        # fp64 until the last rounding: differences between devices' libm then almost never reach the fp32 result.
        radius_N2 = (-2.0 * uniform(words_N4[:, 0::2]).double().log()).sqrt()
        angle_N2 = uniform(words_N4[:, 1::2]).double() * (2 * math.pi)
        at = (block - first_block) * 4
        out_N[at : at + 4 * block_N.numel()] = torch.stack(
            (radius_N2 * angle_N2.cos(), radius_N2 * angle_N2.sin()), dim=-1
        ).flatten()
    return out_N[start - 4 * first_block :][:count]
