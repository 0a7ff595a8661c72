"""Tests that need a GPU. They import nothing but torch, numpy, pytest and this project: `make gpu` runs them on bare machines."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
