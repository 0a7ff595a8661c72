"""Tuning without a GPU: what is tried, what is kept, and that every rank ends with rank 0's table."""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from helpers import GlooPool

from megagrin.cli import main
from megagrin.kernels import tuning
from megagrin.kernels.tuning import OPS, BlockConfig, Table
from megagrin.planning.kernel_tuning import LayerShape, Product, candidates, products, share, tune

LAYER = LayerShape(tokens=8192, d_model=4096, d_ff=6400, n_experts=16, top_k=2)
HOPPER_BYTES = 232_448


def smaller_is_faster(product: Product, blocks: Sequence[BlockConfig]) -> list[float | None]:
    """Made-up times: the tile's area, in milliseconds; group_m 16 fails."""
    return [None if b.group_m == 16 else b.block_m * b.block_n * 1e-3 for b in blocks]


def test_the_fastest_candidate_that_ran_is_kept() -> None:
    table, said = Table("g", "3.6"), []
    tune(table, [LAYER], torch.bfloat16, 9, HOPPER_BYTES, smaller_is_faster, say=said.append)
    assert {key.op for key in table.blocks} == set(OPS)
    assert len(table.blocks) == len(products(LAYER)) == len(said)
    for key, blocks in table.blocks.items():
        tried = [b for b in candidates(key.op, torch.bfloat16, 9, HOPPER_BYTES) if b.group_m != 16]
        assert blocks.block_m * blocks.block_n == min(b.block_m * b.block_n for b in tried)
        flops = 2 * 16384 * key.n * key.k
        assert table.tflops[key] == pytest.approx(flops / (blocks.block_m * blocks.block_n * 1e-3) / 1e12)
        assert key.rows == 1024


def test_nothing_ran_or_no_time_keeps_the_fallback() -> None:
    table, said = Table("g", "3.6"), []
    tune(table, [LAYER], torch.bfloat16, 9, HOPPER_BYTES, lambda _, blocks: [None] * len(blocks), say=said.append)
    assert table.blocks == {}
    assert "nothing ran" in said[0]
    clock = iter([False, True, True, True, True, True, True, True])
    tune(table, [LAYER], torch.bfloat16, 9, HOPPER_BYTES, smaller_is_faster, lambda: next(clock), said.append)
    assert len(table.blocks) == 1
    assert "out of time" in said[-1]


def test_what_does_not_fit_is_never_tried() -> None:
    """On a card with the shared memory of an sm_89 (99 KiB) only small tiles are left beside the fallback."""
    for op in OPS:
        everything, few = (candidates(op, torch.bfloat16, 9, limit) for limit in (HOPPER_BYTES, 101_376))
        assert len(everything) >= 3
        assert everything[0] == few[0] == tuning.fallback(op, torch.bfloat16, 9)
        assert all(tuning.shared_bytes(op, blocks, 2) < 101_376 for blocks in few[1:])
        assert len(few) < len(everything)
        assert len(set(everything)) == len(everything), "a candidate is listed twice"


def _on_a_rank() -> Table:
    table = None
    if dist.get_rank() == 0:
        table = Table("NVIDIA H200", "3.6")
        tune(table, [LAYER], torch.bfloat16, 9, HOPPER_BYTES, smaller_is_faster, say=lambda _: None)
    return share(table)


def _failed_on_rank_0() -> str:
    with pytest.raises(ValueError, match="rank 0 measured nothing") as refused:
        share(None)
    return str(refused.value)


def test_every_rank_ends_with_the_same_table(gloo: GlooPool) -> None:
    tables = gloo.run(3, _on_a_rank)
    assert len(tables[0].blocks) == len(products(LAYER))
    assert tables[1] == tables[2] == tables[0]
    assert len(set(gloo.run(2, _failed_on_rank_0))) == 1


def test_a_shared_table_is_used_in_place_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    table, device = Table("NVIDIA H200", "3.6"), torch.device("cuda", 0)
    tune(table, [LAYER], torch.bfloat16, 9, HOPPER_BYTES, smaller_is_faster, say=lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(tuning, "triton_version", lambda: "3.6")
    monkeypatch.setattr(tuning.backend, "capability", lambda device: (9, 0))
    try:
        tuning.use(table)
        for key, blocks in table.blocks.items():
            assert tuning.config(key.op, torch.bfloat16, key.n, key.k, key.rows, device) == blocks
    finally:
        tuning.use(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "torch sees no CUDA device"),
        (["--shape", "1x2x3"], "--shape: '1x2x3' must be"),
        (["--shape", "1x2x3x0x5"], "--shape: '1x2x3x0x5' must be"),
        (["--preset", "dense_tiny"], "--preset: dense_tiny is none of grin_16x3_8b"),
    ],
)
def test_use_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() and not arguments:
        pytest.skip("there is a GPU here")
    assert main(["kernels", "tune", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
