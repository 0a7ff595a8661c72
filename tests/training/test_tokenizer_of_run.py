"""A training run and its checkpoints agree on what made the tokens."""

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from megagrin.checkpoint import store
from megagrin.checkpoint.store import TokenSource
from megagrin.cli import main
from megagrin.data_prep.indexed import IndexedDatasetWriter
from megagrin.data_prep.sidecar import Provenance, file_sha256
from megagrin.data_prep.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

VOCAB = 97
_TINY = {
    "model.preset": "grin_tiny",
    "model.vocab_size": VOCAB,
    "model.n_layers": 1,
    "model.d_model": 16,
    "model.n_heads": 2,
    "model.head_dim": 8,
    "model.d_ff": 16,
    "model.n_experts": 4,
    "train.seq_len": 16,
    "train.global_batch_size": 2,
    "train.micro_batch_size": 1,
    "engine.dtype": "fp32",
    "optim.warmup_steps": 1,
    "runtime.device": "cpu",
}
_ONE, _OTHER = "1" * 64, "2" * 64


def _write(prefix: Path, provenance: Provenance) -> str:
    with IndexedDatasetWriter(prefix, provenance) as writer:
        for length in (40, 70, 50):
            writer.add(np.arange(length) % VOCAB)
    return str(prefix)


def _train(run_dir: Path, tokens: str, *extra: str) -> int:
    options = [f"--{key}={value}" for key, value in _TINY.items()]
    return main(["train", *options, f"--train.run_dir={run_dir}", f"--data.train={tokens}", "--train.steps=1", *extra])


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_the_sidecar_reaches_the_checkpoint(bos: bool, eos: bool, tmp_path: Path) -> None:
    tokens = _write(tmp_path / "text", Provenance(VOCAB, _ONE, append_bos=bos, append_eos=eos))
    assert _train(tmp_path / "run", tokens) == 0
    assert store.read_info(store.find(tmp_path / "run")).tokens == TokenSource(_ONE, bos, eos)


def test_without_a_sidecar(tmp_path: Path, small_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    """data.tokenizer is what is known then; a run does not continue with another one."""
    tokens = _write(tmp_path / "text", Provenance(VOCAB))
    (tmp_path / "text.json").unlink()
    shutil.copy(small_tokenizer.path, tmp_path / "one")
    train_tokenizer([str(Path(shutil.__file__))], TokenizerConfig(str(tmp_path / "other"), 900, format="text", num_threads=1))
    assert _train(tmp_path / "run", tokens, f"--data.tokenizer={tmp_path / 'one'}", "--model.vocab_size=1000") == 0
    assert store.read_info(store.find(tmp_path / "run")).tokens == TokenSource(file_sha256(tmp_path / "one"))
    (tmp_path / "one").write_text("another content")
    capsys.readouterr()
    more = ["--model.vocab_size=1000", "--train.steps=2"]
    assert _train(tmp_path / "run", tokens, f"--data.tokenizer={tmp_path / 'other'}", *more) == 2
    assert f"data.tokenizer: {tmp_path / 'other'} has SHA-256 {file_sha256(tmp_path / 'other')[:12]}" in capsys.readouterr().err


def test_weights_of_another_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = _write(tmp_path / "one", Provenance(VOCAB, _ONE))
    other = _write(tmp_path / "other", Provenance(VOCAB, _OTHER))
    assert _train(tmp_path / "run", one) == 0
    capsys.readouterr()
    assert _train(tmp_path / "new", other, f"--train.init_from={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert f"train.init_from: the tokenizer has SHA-256 {_OTHER[:12]}" in error
    assert f"trained on tokens of a tokenizer with {_ONE[:12]}" in error
    assert _train(tmp_path / "same", one, f"--train.init_from={tmp_path / 'run'}") == 0


def test_descriptions_of_before(tmp_path: Path) -> None:
    """A checkpoint without the entry is read, and says nothing."""
    info = store.CheckpointInfo(3, 6, {"model": {}, "router": {}}, "print", TokenSource(_ONE, append_bos=True))
    store._write_info(tmp_path, info)
    assert asdict(store.read_info(tmp_path)) == asdict(info)
    path = tmp_path / "checkpoint.json"
    path.write_text(path.read_text().replace('"tokens"', '"something"'))
    assert store.read_info(tmp_path).tokens is None
