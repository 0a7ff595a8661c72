"""Which tokenizer belongs to a checkpoint, how its documents began and ended, and what generation says of both."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_models import BASE, ROUTER, random_model

from megagrin.checkpoint import store
from megagrin.checkpoint.store import TokenSource
from megagrin.checkpoint.tokens import same_pieces
from megagrin.cli import run_command
from megagrin.data_prep.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from megagrin.inference.generate import Sampling, generate
from megagrin.inference.vocabulary import framed, load_vocabulary
from megagrin.models.transformer import Transformer


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Transformer:
    return random_model(replace(BASE, vocab_size=small_tokenizer.vocab_size + 3))


def _save(model: Transformer, path: Path, tokenizer: str | None, tokens: TokenSource | None) -> str:
    run = {"model": asdict(model.config), "router": asdict(ROUTER), "data": {"tokenizer": tokenizer, "train": None}}
    store.save_model(path, model, run, tokens)
    return str(path)


@pytest.fixture(scope="module")
def other_bytes(small_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pieces in a file of other bytes: trained again with two threads, which the file records."""
    import dataclasses

    sources = [str(module.__file__) for module in (dataclasses, json.decoder, json)]
    path = tmp_path_factory.mktemp("again") / "again.model"
    again = train_tokenizer(sources, TokenizerConfig(str(path), vocab_size=1000, format="text", num_threads=2))
    assert again.sha256 != small_tokenizer.sha256
    return path


class TestWhichTokenizer:
    def test_another_one_is_refused(
        self,
        model: Transformer,
        small_tokenizer: Tokenizer,
        tokenizer_path: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        saved = _save(model, tmp_path / "new", None, TokenSource(small_tokenizer.sha256))
        assert run_command("generate", ["--checkpoint", saved, "--prompt=x", "--tokenizer", str(tokenizer_path)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        wrong = Tokenizer.load(tokenizer_path).sha256[:12]
        assert f"--tokenizer: {tokenizer_path} has SHA-256 {wrong}, but {saved}" in captured.err
        assert small_tokenizer.sha256[:12] in captured.err
        assert captured.err.count("\n") == 1

    def test_the_run_s_own_file_was_replaced(
        self, model: Transformer, small_tokenizer: Tokenizer, tokenizer_path: Path, tmp_path: Path
    ) -> None:
        saved = _save(model, tmp_path / "new", str(tokenizer_path), TokenSource(small_tokenizer.sha256))
        with pytest.raises(ValueError, match=r"data\.tokenizer of the run: .* has SHA-256"):
            load_vocabulary(None, Path(saved), store.read_info(Path(saved)))

    def test_older_checkpoints_are_held_against_the_run_s_files(
        self, model: Transformer, small_tokenizer: Tokenizer, tokenizer_path: Path, tmp_path: Path
    ) -> None:
        saved = Path(_save(model, tmp_path / "old", small_tokenizer.path, None))
        description = json.loads((saved / "checkpoint.json").read_text())
        del description["tokens"]
        (saved / "checkpoint.json").write_text(json.dumps(description))
        with pytest.raises(ValueError, match="--tokenizer"):
            load_vocabulary(str(tokenizer_path), saved, store.read_info(saved))
        vocabulary = load_vocabulary(None, saved, store.read_info(saved))
        assert vocabulary is not None
        assert (vocabulary.start_id, vocabulary.end_id) == (None, 2)

    def test_other_names_and_other_bytes_pass(
        self, model: Transformer, small_tokenizer: Tokenizer, other_bytes: Path, tmp_path: Path
    ) -> None:
        saved = Path(_save(model, tmp_path / "new", small_tokenizer.path, TokenSource(small_tokenizer.sha256)))
        shutil.copy(small_tokenizer.path, tmp_path / "renamed.model")
        for path in (tmp_path / "renamed.model", other_bytes):
            assert load_vocabulary(str(path), saved, store.read_info(saved)) is not None

    def test_same_pieces(self, small_tokenizer: Tokenizer, other_bytes: Path, tokenizer_path: Path) -> None:
        assert same_pieces(small_tokenizer, Tokenizer.load(other_bytes))
        assert not same_pieces(small_tokenizer, Tokenizer.load(tokenizer_path))


class TestFrame:
    @pytest.mark.parametrize(
        ("tokens", "start", "end"),
        [
            (TokenSource(), None, 2),
            (TokenSource(None, append_bos=True), 1, 2),
            (TokenSource(None, append_bos=True, append_eos=False), 1, 1),
            (TokenSource(None, append_eos=False), None, None),
        ],
    )
    def test_ids(self, tokens: TokenSource, start: int | None, end: int | None, small_tokenizer: Tokenizer) -> None:
        vocabulary = framed(small_tokenizer, tokens)
        assert (vocabulary.start_id, vocabulary.end_id) == (start, end)
        ids = small_tokenizer.encode("x\0é")
        assert vocabulary.prompt_ids("x\0é") == ([] if start is None else [start]) + ids

    def test_pieces_that_a_model_lacks(self) -> None:
        """SentencePiece says -1 of them: that is no id to start or end with."""
        bare: Any = SimpleNamespace(bos_id=-1, eos_id=-1)
        vocabulary = framed(bare, TokenSource(None, append_bos=True, append_eos=True))
        assert (vocabulary.start_id, vocabulary.end_id) == (None, None)

    def test_generation_starts_from_bos(
        self, model: Transformer, small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        saved = _save(model, tmp_path / "bos", small_tokenizer.path, TokenSource(small_tokenizer.sha256, append_bos=True))
        for text in ("", "  ", "def"):
            arguments = ["--checkpoint", saved, f"--prompt={text}", "--max_new_tokens=9", "--temperature=0"]
            assert run_command("generate", arguments) == 0
            prompt = [1, *small_tokenizer.encode(text)]
            new = list(generate(model, prompt, Sampling(9, 0), 2, small_tokenizer.vocab_size))
            assert capsys.readouterr().out == small_tokenizer.decode(prompt + new) + "\n"

    def test_lone_surrogate(self, small_tokenizer: Tokenizer) -> None:
        with pytest.raises(ValueError, match="--prompt: lone surrogate at character 1"):
            framed(small_tokenizer, TokenSource()).prompt_ids("a\udc80")


class TestLastPosition:
    @pytest.fixture
    def saved(self, small_tokenizer: Tokenizer, tmp_path: Path) -> str:
        endless = random_model(replace(BASE, vocab_size=small_tokenizer.vocab_size))
        with torch.no_grad():
            endless.lm_head.bias[:3] = -1e3
        return _save(endless, tmp_path / "endless", small_tokenizer.path, TokenSource(small_tokenizer.sha256))

    @pytest.mark.parametrize("stream", ["true", "false"])
    def test_it_is_said(self, stream: str, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--checkpoint", saved, "--prompt=0123", "--max_new_tokens=500", f"--stream={stream}"]
        assert run_command("generate", arguments) == 0
        error = capsys.readouterr().err
        assert "generation ended after 60 of 500 tokens" in error
        assert "4 and these fill model.max_positions (64)" in error
        assert error.count("\n") == 1

    def test_nothing_is_said_where_all_fit(self, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_command("generate", ["--checkpoint", saved, "--prompt=0123", "--max_new_tokens=60"]) == 0
        assert capsys.readouterr().err == ""

    def test_a_longer_prompt_prints_nothing_else(self, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_command("generate", ["--checkpoint", saved, f"--prompt={'0' * 64}", "--stream"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "--prompt: 64 tokens must be fewer than model.max_positions (64)" in captured.err
