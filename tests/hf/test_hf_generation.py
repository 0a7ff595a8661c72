"""An export in transformers' hands: batches are padded, texts start and end as in training, unused rows are never drawn."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import BASE, ROUTER, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from megagrin.checkpoint import store
from megagrin.checkpoint.store import TokenSource
from megagrin.cli import run_command
from megagrin.data_prep.tokenizer import Tokenizer
from megagrin.hf.folder import ExportOptions, export_model
from megagrin.inference.generate import Sampling, generate
from megagrin.inference.vocabulary import framed
from megagrin.models.transformer import Transformer

_TEXTS = ["def f(x):", "x = 1\nreturn", "if"]
_UNUSED = 7
_EOS_ONLY = TokenSource()
_BOS_EOS = TokenSource(None, append_bos=True)
_BOS_ONLY = TokenSource(None, append_bos=True, append_eos=False)
_NOTHING = TokenSource(None, append_eos=False)


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Transformer:
    return random_model(replace(BASE, vocab_size=small_tokenizer.vocab_size + _UNUSED))


def _exported(model: Transformer, tokenizer: Tokenizer, tokens: TokenSource, out: Path) -> tuple[Any, Any]:
    export_model(model, ROUTER, framed(tokenizer, tokens), out, ExportOptions())
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, experts_implementation="eager").eval()
    return AutoTokenizer.from_pretrained(out), loaded


@pytest.mark.parametrize("tokens", [_EOS_ONLY, _BOS_EOS], ids=["eos", "bos_eos"])
def test_padded_batches_continue_as_each_text_alone(
    tokens: TokenSource, model: Transformer, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Greedy continuations by transformers of a batch, against ours of each text by itself."""
    tok, theirs = _exported(model, small_tokenizer, tokens, tmp_path / "out")
    batch = tok(_TEXTS, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["attention_mask"][:, -1].all(), "padding stands in front"
    output = theirs.generate(**batch, max_new_tokens=12, do_sample=False)
    vocabulary = framed(small_tokenizer, tokens)
    for text, row in zip(_TEXTS, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
        sampling = Sampling(max_new_tokens=12, temperature=0)
        prompt = vocabulary.prompt_ids(text)
        expected = list(generate(model, prompt, sampling, vocabulary.end_id, small_tokenizer.vocab_size))
        assert row[: len(expected)] == expected


@pytest.mark.parametrize(
    ("tokens", "first", "end"), [(_EOS_ONLY, [], 2), (_BOS_EOS, [1], 2), (_BOS_ONLY, [1], 1), (_NOTHING, [], None)], ids=str
)
def test_texts_start_and_end_as_documents_did(
    tokens: TokenSource, first: list[int], end: int | None, model: Transformer, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tok, theirs = _exported(model, small_tokenizer, tokens, tmp_path / "out")
    ids = small_tokenizer.encode("a </s> b")
    assert tok("a </s> b").input_ids == first + ids
    assert tok("a", "b").input_ids == first + small_tokenizer.encode("a") + first + small_tokenizer.encode("b")
    assert tok.decode(tok("a </s> b").input_ids, skip_special_tokens=True) == "a </s> b"
    assert (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id) == (1, 2, 2)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, end)
    generation = theirs.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, end, 2)


def test_rows_without_a_piece_are_never_drawn(model: Transformer, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    loud = random_model(model.config)
    with torch.no_grad():
        loud.lm_head.bias[small_tokenizer.vocab_size :] = 1e3
    tok, theirs = _exported(loud, small_tokenizer, _EOS_ONLY, tmp_path / "out")
    output = theirs.generate(**tok("x", return_tensors="pt"), max_new_tokens=8, do_sample=True)
    assert output.max() < small_tokenizer.vocab_size


def _saved(model: Transformer, path: Path, tokenizer: Tokenizer, tokens: TokenSource | None) -> Path:
    run = {"model": asdict(model.config), "router": asdict(ROUTER), "data": {"tokenizer": tokenizer.path}}
    store.save_model(path, model, run, tokens)
    return path


def test_framing_survives_export_and_import(model: Transformer, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    for tokens in (_EOS_ONLY, _BOS_EOS, _BOS_ONLY, _NOTHING):
        name = f"{tokens.append_bos}{tokens.append_eos}"
        known = replace(tokens, tokenizer_sha256=small_tokenizer.sha256)
        saved = _saved(model, tmp_path / name, small_tokenizer, known)
        out, back = tmp_path / f"{name}_hf", tmp_path / f"{name}_back"
        assert run_command("export-hf", ["--checkpoint", str(saved), "--out", str(out)]) == 0
        assert run_command("import-hf", ["--source", str(out), "--out", str(back)]) == 0
        assert store.read_info(back).tokens == known


def test_export_with_another_tokenizer(
    model: Transformer, small_tokenizer: Tokenizer, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = _saved(model, tmp_path / "saved", small_tokenizer, TokenSource(small_tokenizer.sha256))
    arguments = ["--checkpoint", str(saved), "--out", str(tmp_path / "x"), "--tokenizer", str(tokenizer_path)]
    assert run_command("export-hf", arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--tokenizer: {tokenizer_path} has SHA-256 {Tokenizer.load(tokenizer_path).sha256[:12]}" in error
    assert f"{small_tokenizer.sha256[:12]} ({small_tokenizer.path})" in error
    assert not (tmp_path / "x").exists()


def test_import_refuses_a_tokenizer_larger_than_the_model(
    model: Transformer, small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = random_model()
    export_model(small, ROUTER, None, tmp_path / "out", ExportOptions())
    (tmp_path / "out/tokenizer.model").write_bytes(Path(small_tokenizer.path).read_bytes())
    assert run_command("import-hf", ["--source", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 2
    assert "1000 pieces must not exceed model.vocab_size (131)" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["pad_token_id"] is None
