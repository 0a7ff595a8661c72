"""Fixtures shared by all tests, and which of those that start ranks are slow.

Comparisons of a layout with one process: `make test` has one of each kind (FAST_FILES), all others are slow. Of the slow ones,
those of eight ranks are left to `make test-all`: on two cores each takes as long as four of the others, and FAST_FILES have some
of each kind.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import GlooPool

from megagrin.data_prep.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

pytest_plugins = ["corpus"]

LAYOUT_FOLDERS = ("engines", "optim", "parallel", "planning")
FAST_FILES = ("test_layouts.py", "test_matrix.py", "test_kernel_tuning.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark cases of LAYOUT_FOLDERS that start ranks as slow, but for those of FAST_FILES; before pytest selects by mark."""
    for item in items:
        here = item.path.parent.name in LAYOUT_FOLDERS and item.path.parents[1] == Path(__file__).parent
        if here and "gloo" in getattr(item, "fixturenames", ()) and item.path.name not in FAST_FILES:
            item.add_marker(pytest.mark.slow)
            callspec = getattr(item, "callspec", None)
            if callspec is not None and callspec.params.get("world_size") == 8:
                item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooPool]:
    """The session's pool of gloo processes."""
    pool = GlooPool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """1000 pieces, trained on the standard library's dataclasses and json modules."""
    import dataclasses
    import json.decoder

    sources = [str(module.__file__) for module in (dataclasses, json.decoder, json)]
    output = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(sources, TokenizerConfig(str(output), vocab_size=1000, format="text", num_threads=1))
