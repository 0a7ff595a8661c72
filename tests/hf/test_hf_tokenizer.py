"""The exported tokenizer gives the ids and texts of the SentencePiece model, through AutoTokenizer."""

import json
import random
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megagrin.checkpoint.store import TokenSource
from megagrin.data_prep.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from megagrin.hf.tokenizer import convert, read_tokenizer, write_tokenizer
from megagrin.inference.vocabulary import framed

_HARD = [
    "",
    " ",
    "   lead and trail   ",
    "\n",
    "\n\n\n\t\t \n",
    "\r\n",
    "a\tb\x0b\x0c\x00c",
    "    def f(x):\n        return x\n",
    "<s> </s> <unk> <0x0A> <0xFF>",
    "</s></s>",
    "\u2581 \u2581\u2581 a\u2581b",
    "naïve λ 漢字 🙂 \u200d\ufeff\ufffd é e\u0301",
    "1234567890 0x1F 3.14e-10",
    " " * 333,
    "=" * 200 + "\n" + "#" * 81,
]


@pytest.fixture(scope="module")
def exported(small_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("exported")
    write_tokenizer(framed(small_tokenizer, TokenSource()), folder, max_positions=64)
    return AutoTokenizer.from_pretrained(folder)


def _same(small_tokenizer: Tokenizer, exported: Any, text: str) -> None:
    ids = small_tokenizer.encode(text)
    assert exported.encode(text) == ids
    assert exported(text).input_ids == ids
    assert exported.decode(ids) == text
    assert exported.decode([1, *ids, 2], skip_special_tokens=True) == text


@pytest.mark.parametrize("text", _HARD)
def test_hard_texts(small_tokenizer: Tokenizer, exported: Any, text: str) -> None:
    _same(small_tokenizer, exported, text)


# Fragments that pieces are made of, whitespace runs and any character: plain st.text() hardly ever meets a merge.
_FRAGMENT = st.sampled_from(
    [" ", "  ", "    ", "\n", "\t", "self", "se", "return", "__", "def ", "(", "0", "\u2581", "</s>", "é"]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_FRAGMENT | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=20).map("".join))
def test_any_text(small_tokenizer: Tokenizer, exported: Any, text: str) -> None:
    _same(small_tokenizer, exported, text)


def test_standard_library(small_tokenizer: Tokenizer, exported: Any) -> None:
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    assert len(sources) > 100
    for source in sources:
        text = source.read_bytes().decode(errors="replace")
        ids = small_tokenizer.encode(text)
        assert exported.backend_tokenizer.encode(text, add_special_tokens=False).ids == ids, source
        assert exported.decode(ids) == text, source


def test_order_of_merges_makes_no_difference(tmp_path: Path) -> None:
    """Small alphabets make many pieces that several pairs form and that overlap themselves."""
    draw = random.Random(7)
    compared = 0
    for trial in range(80):
        alphabet = draw.choice(["ab ", "abc ", " ", "a ", "1a ", "ab \n"])
        weights = [draw.random() ** 2 + 0.01 for _ in alphabet]
        lines = ["".join(draw.choices(alphabet, weights, k=draw.randint(1, 60))) for _ in range(40)]
        (tmp_path / "text").write_text("\n".join([*lines, alphabet, " x"]))
        output = str(tmp_path / f"{trial}.model")
        config = TokenizerConfig(output, vocab_size=draw.randint(270, 300), format="text", num_threads=1)
        try:
            tokenizer = train_tokenizer([str(tmp_path / "text")], config)
        except ValueError as error:
            assert "too large for this corpus" in str(error)  # noqa: PT017
            continue
        fast = convert(tokenizer)
        for _ in range(200):
            text = "".join(draw.choices(alphabet, k=draw.randint(1, 80)))
            assert fast.encode(text, add_special_tokens=False).ids == tokenizer.encode(text), (trial, text)
            compared += 1
    assert compared > 5000


def test_special_ids(small_tokenizer: Tokenizer, exported: Any) -> None:
    assert (exported.unk_token_id, exported.bos_token_id, exported.eos_token_id) == (0, 1, 2)
    assert (len(exported), exported.model_max_length) == (small_tokenizer.vocab_size, 64)
    assert exported.convert_ids_to_tokens([1, 2]) == ["<s>", "</s>"]


def _train_foreign(tmp_path: Path, **options: Any) -> Tokenizer:
    """A SentencePiece model trained with other options than ours."""
    ours = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(random.__file__).read_text().splitlines()),
        model_prefix=str(tmp_path / "foreign"),
        vocab_size=600,
        minloglevel=2,
        **{**ours, **options},
    )
    return Tokenizer.load(tmp_path / "foreign.model")


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"model_type": "unigram"},
        {"byte_fallback": False},
        {"user_defined_symbols": ["return", "random"]},
    ],
    ids=str,
)
def test_models_that_encode_differently_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encoded differently by the converted tokenizer"):
        convert(_train_foreign(tmp_path, **options))


def test_model_without_a_space_is_refused(tmp_path: Path) -> None:
    """Such a model spells a space as the bytes of U+2581 and does not give it back."""
    (tmp_path / "text").write_text("abab\nabba\n" * 20)
    tokenizer = train_tokenizer([str(tmp_path / "text")], TokenizerConfig(str(tmp_path / "m"), vocab_size=264, format="text"))
    with pytest.raises(ValueError, match="encoded differently"):
        convert(tokenizer)


def test_without_the_library(small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"megagrin\[hf\]"):
        convert(small_tokenizer)


@pytest.mark.parametrize(
    ("content", "adds_bos"),
    [
        (None, False),
        ({"tokenizer_class": "LlamaTokenizer"}, True),
        ({"tokenizer_class": "LlamaTokenizerFast"}, True),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}, True),
    ],
)
def test_how_an_imported_tokenizer_frames_a_text(
    tmp_path: Path, small_tokenizer: Tokenizer, content: dict[str, object] | None, adds_bos: bool
) -> None:
    """Llama's class adds bos unless told not to, others only when told; eos ends a text where it is a token of its own."""
    shutil.copy(small_tokenizer.path, tmp_path / "tokenizer.model")
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    for eos_token_id, ends in ((None, False), (small_tokenizer.bos_id, False), (small_tokenizer.eos_id, True)):
        path, source = read_tokenizer(tmp_path, eos_token_id, small_tokenizer.vocab_size)
        assert path == str(tmp_path / "tokenizer.model")
        assert source == TokenSource(small_tokenizer.sha256, adds_bos, ends)
