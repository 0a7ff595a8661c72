"""The random numbers: published vectors, agreement with Triton, and what an address does and does not depend on.

Shape suffixes: N numbers, W words, T tokens.
"""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from megagrin import rng
from megagrin.models.init import fill_normal

torch.set_num_threads(1)

# Random123's known-answer vectors for Philox 4×32-10: counter, key, words.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_published_vectors(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    got = rng.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in got) == words


def test_philox_broadcasts() -> None:
    counter = (torch.arange(3).view(3, 1), torch.arange(4).view(1, 4), torch.zeros((), dtype=torch.int64), torch.tensor([7]))
    words = rng.philox(counter, (5, 6))
    for row in range(3):
        for column in range(4):
            single = rng.philox(tuple(torch.tensor(c) for c in (row, column, 0, 7)), (5, 6))
            assert [int(w[row, column]) for w in words] == [int(w) for w in single]


TRITON_PROGRAM = """
import torch, triton, triton.language as tl
from megagrin import rng

@triton.jit
def words_kernel(seed, c0_ptr, c1_ptr, c2_ptr, c3_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    c0 = tl.load(c0_ptr + i).to(tl.uint32)
    c1 = tl.load(c1_ptr + i).to(tl.uint32)
    c2 = tl.load(c2_ptr + i).to(tl.uint32)
    c3 = tl.load(c3_ptr + i).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(out_ptr + 4 * i, w0.to(tl.int64))
    tl.store(out_ptr + 4 * i + 1, w1.to(tl.int64))
    tl.store(out_ptr + 4 * i + 2, w2.to(tl.int64))
    tl.store(out_ptr + 4 * i + 3, w3.to(tl.int64))

N = 256
generator = torch.Generator().manual_seed(0)
counter = torch.randint(0, 1 << 32, (4, N), generator=generator)
counter[:, 0], counter[:, 1] = 0, 0xFFFFFFFF
for seed in (0, 1, 0x9E3779B97F4A7C15, (1 << 63) + 12345):
    out = torch.empty(N, 4, dtype=torch.int64)
    words_kernel[(1,)](seed, *counter, out, N)
    ours = torch.stack(rng.philox(tuple(counter), rng.seed_key(seed)), dim=-1)
    assert torch.equal(out & 0xFFFFFFFF, ours), f"seed {seed}"
print("agree")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_agrees_with_triton(tmp_path: Path) -> None:
    program = tmp_path / "triton_philox.py"  # a file: triton reads a kernel's source
    program.write_text(TRITON_PROGRAM)
    root = str(Path(rng.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, str(program)], env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "agree"


def words_of(seed: int = 1, step: int = 2, layer: int = 3, token: int = 4, blocks: int = 1) -> list[int]:
    return rng.routing_words(seed, step, layer, torch.tensor([token]), blocks)[0].tolist()


def test_every_coordinate_of_the_address_counts() -> None:
    """Token indices that share their low 32 bits, seeds that share theirs, and swapped coordinates all differ."""
    base = {"seed": 1, "step": 2, "layer": 3, "token": 4}
    addresses = [base]
    for name, values in {
        "seed": (0, 2, 1 + (1 << 32), (1 << 64) - 1),
        "step": (0, 3, (1 << 32) - 1),
        "layer": (0, 2, 4),
        "token": (0, 5, 4 + (1 << 32), 4 + (1 << 33), (1 << 48) - 1),
    }.items():
        addresses += [{**base, name: value} for value in values]
    blocks = [tuple(words_of(**address, blocks=2)[at : at + 4]) for address in addresses for at in (0, 4)]
    assert len(set(blocks)) == len(blocks) == 2 * len(addresses)


def test_counter_layout() -> None:
    """(token low, token high and block, layer, step) under the seed's halves: a fused router must lay out the same."""
    got = rng.routing_words((9 << 32) | 8, 7, 6, torch.tensor([(3 << 32) | 5]), 2)[0]
    expected = [rng.philox(tuple(torch.tensor(c) for c in (5, 3 | block << 16, 6, 7)), (8, 9)) for block in (0, 1)]
    assert got.tolist() == [int(word) for words in expected for word in words]


def test_many_tokens_have_distinct_words() -> None:
    token_T = torch.cat([torch.arange(20000), torch.arange(20000) + (1 << 32)])
    words_TW = rng.routing_words(7, 0, 0, token_T, 2)
    assert words_TW.shape == (40000, 8)
    assert words_TW.dtype == torch.int64
    assert int(words_TW.min()) >= 0
    assert int(words_TW.max()) < 1 << 32
    pairs = words_TW[:, 0] << 31 ^ words_TW[:, 1]  # 63 bits: a chance collision among 80000 has probability below 1e-9
    more = words_TW[:, 4] << 31 ^ words_TW[:, 5]
    assert torch.cat([pairs, more]).unique().numel() == 80000


def test_words_do_not_depend_on_the_batch() -> None:
    token_T = torch.randint(0, 1 << 48, (100,), generator=torch.Generator().manual_seed(0))
    whole = rng.routing_words(9, 5, 1, token_T, 3)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rng.routing_words(9, 5, 1, token_T[order], 3), whole[order])
    assert torch.equal(rng.routing_words(9, 5, 1, token_T[:7], 3), whole[:7])
    # top_k = 2 needs one block and top_k = 3 two: the rounds they share see the same words.
    assert torch.equal(rng.routing_words(9, 5, 1, token_T, 1), whole[:, :4])


def test_seed_outside_64_bits_is_refused() -> None:
    for seed in (-1, 1 << 64):
        with pytest.raises(ValueError, match=rf"seed: {seed} must lie in \[0, 2\^64\)"):
            rng.seed_key(seed)


def test_uniform_stays_inside_the_open_interval() -> None:
    u = rng.uniform(torch.tensor([0, 1, (1 << 31), (1 << 32) - 1]))
    assert u.dtype == torch.float32
    assert u.tolist() == [2.0**-24, 2.0**-24, 0.5 + 2.0**-24, 1 - 2.0**-24]
    words_TW = rng.routing_words(3, 0, 0, torch.arange(50000), 1)
    u_N = rng.uniform(words_TW).double().flatten()
    n = u_N.numel()
    assert abs(u_N.mean() - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert abs(u_N.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)


def kolmogorov_smirnov(sample_N: torch.Tensor, cdf_N: torch.Tensor) -> float:
    """√n · sup |F_n − F|; 1.95 is exceeded with probability 0.001."""
    n = sample_N.numel()
    step_N = torch.arange(n, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum(cdf_N - step_N, step_N + 1 / n - cdf_N).max())


@pytest.mark.parametrize("name", ["layers.0.moe.experts.down_proj", "embed.weight"])
def test_normal_numbers_are_normal(name: str) -> None:
    n = 200_000
    x_N = rng.normal_run(0, n, rng.stream_key(11, name), torch.device("cpu")).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x_N.pow(power).mean() - moment) < 4 * math.sqrt(variance / n), f"moment {power}"
    for lag in range(1, 9):  # the four numbers of a block, and neighbouring blocks, do not correlate
        assert abs((x_N[lag:] * x_N[:-lag]).mean()) < 4 / math.sqrt(n), f"lag {lag}"
    ordered_N = x_N.sort().values
    assert kolmogorov_smirnov(ordered_N, 0.5 * torch.erfc(-ordered_N / math.sqrt(2))) < 1.95


def test_streams_differ_by_seed_and_name() -> None:
    keys = {rng.stream_key(seed, name) for seed in range(5) for name in ("a", "b", "1/a")}
    assert len(keys) == 15
    runs = [rng.normal_run(0, 64, rng.stream_key(0, name), torch.device("cpu")) for name in ("a", "b")]
    assert not (runs[0] == runs[1]).any()


def test_normal_run_is_independent_of_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    key, cpu = rng.stream_key(3, "w"), torch.device("cpu")
    whole = rng.normal_run(0, 300, key, cpu)
    for start, count in ((0, 1), (1, 2), (3, 5), (4, 0), (5, 0), (7, 293), (299, 1)):
        assert torch.equal(rng.normal_run(start, count, key, cpu), whole[start : start + count]), (start, count)
    monkeypatch.setattr(rng, "_CHUNK", 7)
    assert torch.equal(rng.normal_run(0, 300, key, cpu), whole)
    assert torch.equal(rng.normal_run(2, 250, key, cpu), whole[2:252])
    far = (1 << 40) + 3
    assert torch.equal(rng.normal_run(far, 9, key, cpu)[2:], rng.normal_run(far + 2, 7, key, cpu))
    assert not torch.equal(rng.normal_run(1 << 34, 8, key, cpu), whole[:8])  # 2^34 numbers = 2^32 blocks further


def test_normal_run_launches_little_on_a_device() -> None:
    """2^26 numbers in few operators: blocks of a CPU's size take 250 for every 2^18, 2.6 million for a full-width model."""

    class Count(TorchDispatchMode):
        operators = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.operators += 1
            return func(*args, **(kwargs or {}))

    with Count() as count:
        assert rng.normal_run(0, 1 << 26, rng.stream_key(3, "w"), torch.device("meta")).shape == (1 << 26,)
    assert 0 < count.operators < 2000


@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((7, 5), (Shard(0), Replicate())),
        ((6, 10), (Replicate(), Shard(1))),
        ((8, 6, 5), (Shard(0), Shard(1))),
        ((4, 6, 5), (Shard(0), Shard(2))),
        ((3, 5), (Shard(0), Shard(0))),  # fewer rows than ranks: some shards are empty
        ((13,), (Shard(0), Replicate())),
    ],
)
def test_shards_of_an_initialised_parameter_equal_the_whole(shape: tuple[int, ...], placements: tuple) -> None:
    """Each rank's shard, filled by itself, is the slice of the tensor that one rank alone would fill."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    from torch.testing._internal.distributed.fake_pg import FakeStore

    key = rng.stream_key(5, "weight")
    whole = torch.empty(shape)
    fill_normal(whole, key, 0.3)
    assert torch.equal(whole.flatten(), 0.3 * rng.normal_run(0, whole.numel(), key, torch.device("cpu")))
    covered = torch.zeros(shape, dtype=torch.bool)
    for rank in range(4):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            mesh = init_device_mesh("cpu", (2, 2))
            local_shape, offset = compute_local_shape_and_global_offset(torch.Size(shape), mesh, placements)
            local = torch.full(local_shape, math.nan)
            stride = torch.empty(shape).stride()
            if local.numel():
                fill_normal(DTensor.from_local(local, mesh, placements, shape=torch.Size(shape), stride=stride), key, 0.3)
            place = tuple(slice(start, start + size) for start, size in zip(offset, local_shape, strict=True))
            assert torch.equal(local, whole[place])
            covered[place] = True
        finally:
            torch.distributed.destroy_process_group()
    assert covered.all()
