"""Fixtures shared by all tests."""

from collections.abc import Iterator

import pytest
import torch
from helpers import GlooPool


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooPool]:
    """The session's pool of gloo processes."""
    pool = GlooPool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
