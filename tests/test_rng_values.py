"""Random numbers against a second implementation: plain integers and the standard library's mathematics."""

import hashlib
import math

import pytest
import torch

from megagrin import rng


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox 4×32-10 of Salmon et al., figure 2, in Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1), word = counter, key, 1 << 32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b // word) ^ c1 ^ k0, b % word, (a // word) ^ c3 ^ k1, a % word
        k0, k1 = (k0 + 0x9E3779B9) % word, (k1 + 0xBB67AE85) % word
    return c0, c1, c2, c3


@pytest.mark.parametrize("start", [0, 5, (1 << 34) - 6, (1 << 40) + 1])
def test_normal_numbers_are_box_muller_of_the_blocks(start: int) -> None:
    """Index i is number i mod 4 of block i div 4: √(−2 ln u₀)·cos 2πu₁, its sine, then the same of words 2 and 3."""
    key = rng.stream_key(7, "layers.0.attention.q_proj.weight")
    got = rng.normal_run(start, 11, key, torch.device("cpu"))
    assert got.dtype == torch.float32
    for place, value in enumerate(got.tolist()):
        block, number = divmod(start + place, 4)
        words = philox((block % (1 << 32), block >> 32, 0, 0), key)
        radius_u, angle_u = (((words[number // 2 * 2 + i] >> 9) + 0.5) / 2**23 for i in (0, 1))
        turn = math.sin if number % 2 else math.cos
        expected = math.sqrt(-2 * math.log(radius_u)) * turn(2 * math.pi * angle_u)
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_stream_has_the_key_of_its_hash() -> None:
    """Saved models are found again by it: the first eight bytes of SHA-256, as two little-endian words."""
    digest = hashlib.sha256(b"7/embed.weight").digest()
    low = sum(byte << 8 * place for place, byte in enumerate(digest[:4]))
    high = sum(byte << 8 * place for place, byte in enumerate(digest[4:8]))
    assert rng.stream_key(7, "embed.weight") == (low, high)


def test_routing_words_are_philox_of_their_address() -> None:
    seed, step, layer, tokens = (5 << 32) | 3, 11, 2, [0, 1, (1 << 32) + 9, (1 << 48) - 1]
    got = rng.routing_words(seed, step, layer, torch.tensor(tokens), 3)
    assert got.shape == (4, 12)
    for row, token in zip(got.tolist(), tokens, strict=True):
        blocks = [philox((token % (1 << 32), (token >> 32) | (block << 16), layer, step), (3, 5)) for block in range(3)]
        assert row == [word for words in blocks for word in words]


def test_seeds_of_64_bits_have_a_key() -> None:
    assert rng.seed_key(0) == (0, 0)
    assert rng.seed_key((1 << 64) - 1) == ((1 << 32) - 1, (1 << 32) - 1)
    assert rng.seed_key(1 << 32) == (0, 1)
