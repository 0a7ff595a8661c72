"""Tables of measured blocks: looked up, refused when damaged, written whole."""

import importlib.metadata
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from megagrin.kernels import tuning
from megagrin.kernels.tuning import BlockConfig, Key, Table

BLOCKS = BlockConfig(128, 256, 64, 8, 4)
KEY = Key("m_grouped", "bfloat16", 4096, 6400, 1024)
CUDA = torch.device("cuda", 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tables are looked for in this test."""
    monkeypatch.setenv("MEGAGRIN_TUNED", str(tmp_path))
    return tmp_path


def written(folder: Path) -> Path:
    path = tuning.table_path(folder, "NVIDIA H200", "3.6")
    tuning.write_table(Table("NVIDIA H200", "3.6", {KEY: BLOCKS}, {KEY: 651.25}), path)
    return path


def test_a_table_comes_back_as_it_was_written(folder: Path) -> None:
    path = written(folder)
    assert path.name == "nvidia_h200_triton3.6.json"
    assert tuning.read_table(path) == Table("NVIDIA H200", "3.6", {KEY: BLOCKS}, {KEY: 651.2})
    assert list(folder.iterdir()) == [path], "a temporary file was left behind"


def test_the_nearest_bucket_of_the_same_product_is_taken() -> None:
    table = Table("g", "3.6")
    for rows, group_m in ((128, 1), (1024, 2), (4096, 4)):
        table.blocks[Key("wgrad", "bfloat16", 64, 32, rows)] = BlockConfig(128, 128, 64, 8, 3, group_m=group_m)
    found = {rows: table.find(Key("wgrad", "bfloat16", 64, 32, rows)) for rows in tuning.BUCKETS}
    assert {rows: blocks and blocks.group_m for rows, blocks in found.items()} == {
        128: 1,
        256: 1,
        512: 2,
        1024: 2,
        2048: 2,
        4096: 4,
    }
    for other in (("dgrad", "bfloat16", 64, 32), ("wgrad", "float32", 64, 32), ("wgrad", "bfloat16", 32, 32)):
        assert table.find(Key(*other, 1024)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "expected"), [(0, 128), (127, 128), (255, 128), (256, 256), (2047, 1024), (99999, 4096)])
def test_rows_fall_into_the_bucket_they_reach(rows: int, expected: int) -> None:
    assert tuning.bucket(rows) == expected


def damaged(record: dict[str, Any], path: str, value: Any) -> None:
    """Set (or, for None, delete) record[a][b]… for path a.b…"""
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        record = record[part]  # type: ignore[index]
    if value is None:
        del record[last]  # type: ignore[arg-type]
    else:
        record[last] = value  # type: ignore[index]


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("format", 2, r"table.format: 2 is not 1"),
        ("gpu", None, r"table.gpu is missing"),
        ("triton", 3.6, r"table.triton: 3.6 must be of type str"),
        ("gpu", "NVIDIA H100", r"table.gpu: 'NVIDIA H100' must be 'NVIDIA H200'"),
        ("entries", {}, r"table.entries: \{\} must be of type list"),
        ("entries.0.op", "gemm", r"entries\[0\].op: 'gemm' is none of m_grouped"),
        ("entries.0.dtype", "int8", r"entries\[0\].dtype: 'int8' is none of"),
        ("entries.0.n", 0, r"entries\[0\]: n 0 and k 6400 must be at least 1"),
        ("entries.0.k", True, r"entries\[0\].k: True must be of type int"),
        ("entries.0.rows_per_expert", 1000, r"entries\[0\].rows_per_expert: 1000 is none of the buckets"),
        ("entries.0.blocks.block_m", 100, r"entries\[0\].blocks.block_m: 100 is none of 32, 64, 128, 256"),
        ("entries.0.blocks.num_stages", "4", r"entries\[0\].blocks.num_stages: '4' must be of type int"),
        ("entries.0.blocks.slices", None, r"entries\[0\].blocks.slices is missing"),
        ("entries.0.blocks.colour", 1, r"entries\[0\].blocks.colour: no such field"),
        ("entries.0.tflops", None, r"entries\[0\].tflops is missing"),
        ("entries.0.blocks", {**vars(BLOCKS), "block_n": 32, "slices": 4}, r"slices: 4 slices of 32 columns"),
        ("entries.1", None, None),
    ],
)
def test_a_damaged_table_is_refused_by_file_and_field(folder: Path, where: str, value: Any, message: str | None) -> None:
    path = written(folder)
    record = json.loads(path.read_text())
    if message is None:
        record["entries"].append(record["entries"][0])
        message = r"entries\[1\]: the same product as an earlier entry"
    else:
        damaged(record, where, value)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message) as refused:
        tuning.find_table("NVIDIA H200", "3.6")
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00\x01", '{"format": 1'])
def test_what_is_no_table_is_refused_by_file(folder: Path, content: str) -> None:
    path = written(folder)
    path.write_text(content)
    with pytest.raises(ValueError, match=str(path)):
        tuning.find_table("NVIDIA H200", "3.6")


def test_an_unknown_gpu_takes_the_fallback_and_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(folder)
    with caplog.at_level(logging.WARNING):
        assert tuning.find_table("NVIDIA B300", "3.6") is None
        assert tuning.find_table("NVIDIA H200", "3.7") is None
    assert [record.getMessage() for record in caplog.records] == [
        "kernels: no table nvidia_b300_triton3.6.json: NVIDIA B300 under Triton 3.6 takes the fallback blocks",
        "kernels: no table nvidia_h200_triton3.7.json: NVIDIA H200 under Triton 3.7 takes the fallback blocks",
    ]


def test_the_version_is_that_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton that torch brings along can be installed as pytorch-triton."""

    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    triton = pytest.importorskip("triton")
    monkeypatch.setattr(importlib.metadata, "version", unknown)
    tuning.triton_version.cache_clear()
    assert triton.__version__.startswith(f"{tuning.triton_version()}.")


def test_only_the_first_rank_speaks(folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert tuning.find_table("NVIDIA B300", "3.6") is None
    assert not caplog.records


def test_lookup_takes_the_table_then_the_fallback_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with the two questions to the driver answered here."""
    blocks = BlockConfig(64, 256, 64, 4, 4, slices=1)
    tuning.write_table(Table("NVIDIA H200", "3.6", {KEY: blocks}), tuning.table_path(folder, "NVIDIA H200", "3.6"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(tuning, "triton_version", lambda: "3.6")
    monkeypatch.setattr(tuning.backend, "capability", lambda device: (9, 0))
    caches = (tuning._table, tuning._lookup)
    try:
        for cache in caches:
            cache.cache_clear()
        for rows in (1024, 1500, 5000):
            assert tuning.config("m_grouped", torch.bfloat16, 4096, 6400, rows, CUDA) == blocks
        other = tuning.config("m_grouped", torch.bfloat16, 4096, 4096, 1024, CUDA)
        assert other == tuning.fallback("m_grouped", torch.bfloat16, 9)
        with tuning.forced("m_grouped", BLOCKS):
            assert tuning.config("m_grouped", torch.bfloat16, 4096, 6400, 1024, CUDA) == BLOCKS
        assert tuning.config("m_grouped", torch.bfloat16, 4096, 6400, 1024, CUDA) == blocks
    finally:
        for cache in caches:
            cache.cache_clear()


def test_a_write_that_fails_leaves_the_old_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(folder)
    before = path.read_text()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        tuning.write_table(Table("NVIDIA H200", "3.6"), path)
    assert path.read_text() == before
    assert list(folder.iterdir()) == [path]


def test_every_table_of_the_repository_is_valid() -> None:
    for path in sorted((Path(tuning.__file__).parent / "tuned").glob("*.json")):
        table = tuning.read_table(path)
        assert path.name == tuning.table_path(path.parent, table.gpu, table.triton).name


def test_shared_memory_of_the_checked_blocks() -> None:
    """What Triton 3.6 reported for sm_90 when compiled offline, within 1 KiB."""
    known = [
        ("m_grouped", BlockConfig(128, 256, 64, 8, 4, slices=2), 229_408),
        ("m_grouped", BlockConfig(128, 256, 64, 8, 3, slices=1), 213_016),
        ("m_grouped", BlockConfig(128, 256, 64, 8, 4, slices=1), 262_176),
        ("up_swiglu", BlockConfig(128, 256, 64, 8, 4, slices=4), 221_216),
        ("up_swiglu", BlockConfig(128, 256, 64, 8, 3, slices=1), 245_784),
        ("wgrad", BlockConfig(128, 256, 64, 8, 4, slices=2), 229_440),
        ("wgrad_fp32", BlockConfig(128, 256, 64, 8, 3, slices=2), 213_048),
    ]
    for op, blocks, reported in known:
        assert abs(tuning.shared_bytes(op, blocks, 2) - reported) < 1024, (op, blocks)
