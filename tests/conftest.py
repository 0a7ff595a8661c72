"""Fixtures shared by all tests."""

from collections.abc import Iterator

import pytest
import torch
from helpers import GlooPool

from megagrin.data_prep.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer


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
