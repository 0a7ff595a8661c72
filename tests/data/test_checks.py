"""What a dry run knows of token files: every violation at once, named by its setting, without reading the files whole."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagrin.data.checks import file_violations
from megagrin.data.loader import DataConfig
from megagrin.data_prep import indexed
from megagrin.data_prep.indexed import IndexedDataset, IndexedDatasetWriter
from megagrin.data_prep.layout import read_outline
from megagrin.data_prep.sidecar import Provenance, file_sha256

VOCAB = 100


def write(prefix: Path, lengths: list[int], sha256: str | None = None, vocab_size: int = VOCAB) -> str:
    with IndexedDatasetWriter(prefix, Provenance(vocab_size, sha256)) as writer:
        writer.add(np.arange(sum(lengths)) % VOCAB, lengths)
    return str(prefix)


def without_sidecar(prefix: str) -> str:
    Path(f"{prefix}.json").unlink()
    return prefix


def violations(vocab_size: int = VOCAB, seq_len: int = 8, eval_samples: int = 2, **config: Any) -> list[str]:
    return file_violations(DataConfig(**config), vocab_size=vocab_size, seq_len=seq_len, eval_samples=eval_samples)


@pytest.fixture
def good(tmp_path: Path) -> str:
    return write(tmp_path / "good", [30, 0, 1, 40], "a" * 64)


def test_nothing_to_say_of_good_files(good: str, tmp_path: Path) -> None:
    assert violations() == []
    for name in ("one", "two"):
        for suffix in ("bin", "idx"):
            shutil.copy(f"{good}.{suffix}", tmp_path / f"{name}.{suffix}")
    for document_attention in (False, True):
        assert violations(train=good, valid=good, document_attention=document_attention) == []
        one, two = str(tmp_path / "one"), str(tmp_path / "two")
        assert violations(train=one, valid=two, document_attention=document_attention) == []
    assert violations(train=good, valid=good, seq_len=7, eval_samples=10) == []  # 71 tokens hold ten samples of 7 + 1


def test_the_tokenizer_is_compared_with_both(tmp_path: Path) -> None:
    model = tmp_path / "t.model"
    model.write_bytes(b"pieces")
    right = write(tmp_path / "right", [30], file_sha256(model))
    wrong = write(tmp_path / "wrong", [30], "b" * 64)
    assert violations(train=right, valid=right, tokenizer=str(model)) == []
    between, against = violations(train=right, valid=wrong, tokenizer=str(model))
    assert between.startswith(
        f"data.valid: {wrong} was made with another tokenizer (SHA-256 bbbbbbbbbbbb) than data.train={right}"
    )
    assert against.startswith(
        f"data.tokenizer: {model} has SHA-256 {file_sha256(model)[:12]}, but {wrong}.json of data.valid rec"
    )
    assert violations(train=right, tokenizer=str(tmp_path / "no")) == [f"data.tokenizer: {tmp_path}/no: no such tokenizer file"]
    assert violations(train=right, tokenizer=str(tmp_path)) == [f"data.tokenizer: {tmp_path}: no such tokenizer file"]


def test_every_violation_is_named(good: str, tmp_path: Path) -> None:
    empty = write(tmp_path / "empty", [0, 0])
    single = write(tmp_path / "single", [1] * 50)
    late = write(tmp_path / "late", [1] * 50 + [9])
    bare = without_sidecar(write(tmp_path / "bare", [60]))
    negative = without_sidecar(write(tmp_path / "negative", [60], vocab_size=70_000))  # int32
    np.memmap(f"{negative}.bin", IndexedDataset(negative).tokens_T.dtype, mode="r+")[3] = -7
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"train": "nope", "valid": "none"}, ["data.train: nope.idx: no such file", "data.valid: none.idx: no such file"]),
        ({"train": empty}, [f"data.train: {empty}: no token in 2 documents"]),
        ({"train": good, "seq_len": 71}, [f"data.train: {good}: 71 tokens are too few for one sample of train.seq_len + 1 = 72"]),
        ({"train": good, "valid": good, "seq_len": 71}, ["data.train: ", "data.valid: "]),
        ({"valid": good, "eval_samples": 9}, ["train.eval_samples: 9 exceeds the 8 samples of train.seq_len=8 tokens in da"]),
        ({"train": good, "vocab_size": 99}, [f"data.train: {good}: its tokenizer has vocab_size=100, the model only model.voc"]),
        ({"valid": good, "seq_len": 1, "eval_samples": 71}, ["train.eval_samples: 71 exceeds the 70 samples of train.seq_len=1"]),
        ({"valid": good, "seq_len": 0, "eval_samples": 71}, []),  # another rule's: nothing is divided by it here
        ({"train": negative}, [f"data.train: {negative}.bin: token id -7 lies outside the model's vocabulary"]),
        ({"train": bare, "vocab_size": 50}, [f"data.train: {bare}.bin: token id 59 lies outside the model's vocabulary"]),
        ({"train": single, "valid": late, "document_attention": True}, [
            f"data.train: {single}: with data.document_attention none of its first 50 tokens has a label",
            f"data.valid: {late}: with data.document_attention none of its first 17 tokens has a label",
        ]),
        ({"train": "x" * 300}, [f"data.train: {'x' * 300}.idx: File name too long"]),
        ({"train": "a\0b"}, ["data.train: a\0b.idx: no such file"]),
    ]  # fmt: skip
    for options, expected in cases:
        found = violations(**options)
        assert len(found) == len(expected), (options, found)
        assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), (options, found)


def test_damage_is_seen_without_reading_the_files(good: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index alone of 10^9 documents has 20 GB: neither it nor the tokens are read or hashed."""

    def read_whole(*_: object) -> None:
        raise AssertionError("a whole file was read")

    monkeypatch.setattr(indexed, "file_sha256", read_whole)
    monkeypatch.setattr(indexed, "read_index", read_whole)
    assert violations(train=good, valid=good, document_attention=False) == []
    assert violations(train=good, document_attention=True) == []
    with Path(f"{good}.bin").open("ab") as file:
        file.write(b"xx")
    assert "good.bin: 144 bytes, but its index describes 142" in violations(train=good)[0]
    Path(f"{good}.idx").write_bytes(b"MMIDIDX")
    assert "good.idx: 7 bytes, but a header alone has 34" in violations(train=good)[0]


@pytest.mark.parametrize("lengths", [[30, 0, 1, 40], [0], [], [3]])
def test_the_outline_says_what_the_whole_index_says(tmp_path: Path, lengths: list[int]) -> None:
    prefix = write(tmp_path / "a", lengths)
    outline, dataset = read_outline(prefix), IndexedDataset(prefix)
    assert (outline.documents, outline.tokens, outline.sidecar) == (dataset.documents, dataset.tokens, dataset.sidecar)
    assert (outline.dtype, outline.first_tokens(31).tolist()) == (dataset.tokens_T.dtype, dataset.tokens_T[:31].tolist())
