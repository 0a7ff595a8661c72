"""What tests of the data commands share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megagrin.data_prep.tokenize import TokenizeConfig, TokenizeReport, tokenize


@pytest.fixture
def run(tmp_path: Path, tokenizer_path: Path) -> Callable[..., TokenizeReport]:
    """Tokenizes the given inputs to tmp_path/out with one worker unless told otherwise."""

    def call(*inputs: Path | str, name: str = "out", block_bytes: int = 4 << 20, **options: object) -> TokenizeReport:
        settings = {"workers": 1} | options
        config = TokenizeConfig(str(tmp_path / name), str(tokenizer_path), **settings)  # type: ignore[arg-type]
        return tokenize([str(path) for path in inputs], config, block_bytes=block_bytes)

    return call
