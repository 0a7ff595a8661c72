"""Tests that need a GPU. They import nothing but torch, numpy, pytest and this project: `make gpu` runs them on bare machines."""

import json
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

import device_memory  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", type=int, default=0, help="which part of the tests to run")
    parser.addoption("--shards", type=int, default=1, help="into how many parts they are dealt")
    parser.addoption("--peaks", default="", help="file for the memory peaks of the process")


def pytest_configure() -> None:
    device_memory.cap()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if path := session.config.getoption("--peaks"):
        Path(path).write_text(json.dumps(device_memory.peaks()) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = items[config.getoption("--shard") :: config.getoption("--shards")]
    skip = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """What a kernel does not write is NaN, not the right answer of an earlier call."""
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        blocks = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(8)]
        blocks += [torch.full((1 << size,), float("nan"), device="cuda") for size in range(8, 20) for _ in range(4)]
        del blocks
