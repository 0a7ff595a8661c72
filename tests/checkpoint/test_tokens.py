"""Whether a tokenizer is the one a model learned with, as a checkpoint knows it, or as its run's files do."""

from pathlib import Path

import pytest

from megagrin.checkpoint.store import CheckpointInfo, TokenSource
from megagrin.checkpoint.tokens import Candidate, mismatch, recorded, token_source
from megagrin.data_prep.indexed import IndexedDataset, IndexedDatasetWriter
from megagrin.data_prep.sidecar import Provenance, file_sha256
from megagrin.data_prep.tokenizer import Tokenizer

CHECKPOINT = Path("run/checkpoints/step_00000008")


@pytest.fixture
def resaved(tmp_path: Path, small_tokenizer: Tokenizer) -> Path:
    """The same pieces in other bytes: a field that no piece depends on (the trainer's prefix of its output) is another."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(Path(small_tokenizer.path).read_bytes())
    model.trainer_spec.model_prefix = "elsewhere"
    path = tmp_path / "resaved.model"
    path.write_bytes(model.SerializeToString())
    return path


def info(tokens: TokenSource | None, **data: str) -> CheckpointInfo:
    return CheckpointInfo(8, 32, {"model": {}, "router": {}, "data": data}, tokens=tokens)


def test_other_bytes_with_the_same_pieces_pass(small_tokenizer: Tokenizer, resaved: Path) -> None:
    """Looked at only where the run's own tokenizer is still there to compare with."""
    sha256 = file_sha256(resaved)
    assert sha256 != small_tokenizer.sha256
    candidate = Candidate("--tokenizer", str(resaved), sha256)
    learned = TokenSource(small_tokenizer.sha256)
    assert mismatch(candidate, CHECKPOINT, info(learned, tokenizer=small_tokenizer.path)) is None
    gone = mismatch(candidate, CHECKPOINT, info(learned, tokenizer="gone.model"))
    assert gone == (
        f"--tokenizer: {resaved} has SHA-256 {sha256[:12]}, but {CHECKPOINT} was trained on tokens of a tokenizer with "
        f"{small_tokenizer.sha256[:12]} (gone.model); its ids mean other pieces"
    )
    unnamed = mismatch(candidate, CHECKPOINT, info(learned))
    assert unnamed is not None
    assert unnamed.endswith(f"a tokenizer with {small_tokenizer.sha256[:12]}; its ids mean other pieces")
    without_file = mismatch(Candidate("data.train", None, sha256), CHECKPOINT, info(learned, tokenizer=small_tokenizer.path))
    assert without_file is not None
    assert without_file.startswith("data.train: the tokenizer has SHA-256 ")


def test_what_nobody_knows_is_no_mismatch() -> None:
    for candidate, learned in ((None, "a" * 64), ("b" * 64, None), ("a" * 64, "a" * 64)):
        assert mismatch(Candidate("--tokenizer", "t.model", candidate), CHECKPOINT, info(TokenSource(learned))) is None


def test_an_old_checkpoint_asks_its_files(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    """Only while the token file is the one the run read; else its tokenizer's file alone."""
    with IndexedDatasetWriter(tmp_path / "a", Provenance(100, "c" * 64, append_bos=True, append_eos=False)) as writer:
        writer.add([1, 2, 3])
    prefix = str(tmp_path / "a")
    assert token_source(prefix, small_tokenizer.path) == TokenSource("c" * 64, append_bos=True, append_eos=False)
    assert token_source(None, small_tokenizer.path) == TokenSource(small_tokenizer.sha256)
    assert token_source(None, str(tmp_path / "gone")) == token_source(None, None) == TokenSource(None)
    run = {"data": {"train": prefix, "tokenizer": small_tokenizer.path}}
    same = CheckpointInfo(8, 32, run, IndexedDataset(prefix).fingerprint())
    assert recorded(same) == TokenSource("c" * 64, append_bos=True, append_eos=False)
    assert recorded(CheckpointInfo(8, 32, run, {"other": "file"})) == TokenSource(small_tokenizer.sha256)
    assert recorded(CheckpointInfo(8, 32, {})) == TokenSource(None)
