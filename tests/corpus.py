"""Fixtures of both data folders: a small corpus of Python source, and a tokenizer and token files made of it once."""

import argparse
import inspect
import json
import json.decoder
import textwrap
from pathlib import Path

import pytest
from hypothesis import settings

from megagrin.data_prep.tokenize import TokenizeConfig, tokenize
from megagrin.data_prep.tokenizer import TokenizerConfig, train_tokenizer

VOCAB_SIZE = 700

# Writing token files waits for the disk: a busy machine took 0.7 s for an example, whose limit is 0.2 s by default.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Some hundred functions of the standard library, of very different lengths."""
    modules = (json.decoder, textwrap, argparse, inspect)
    found = [inspect.getsource(f) for module in modules for _, f in inspect.getmembers(module, inspect.isfunction)]
    assert len(found) > 80
    return found


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """The texts as jsonl."""
    path = tmp_path_factory.mktemp("corpus") / "code.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_path(corpus: Path) -> Path:
    """A tokenizer trained on the corpus."""
    path = corpus.parent / "tokenizer.model"
    train_tokenizer([str(corpus)], TokenizerConfig(str(path), VOCAB_SIZE, num_threads=1))
    return path


@pytest.fixture(scope="session")
def token_file(corpus: Path, tokenizer_path: Path) -> str:
    """Prefix of the corpus' token files."""
    prefix = str(corpus.parent / "code")
    tokenize([str(corpus)], TokenizeConfig(prefix, str(tokenizer_path), workers=1))
    return prefix
