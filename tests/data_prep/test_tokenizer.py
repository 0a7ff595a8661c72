"""Tokenizer: lossless on every text, cutting long texts changes nothing, and training errors say what to do."""

import gzip
import inspect
import json
import pickle
import textwrap
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megagrin.data_prep import tokenizer as module
from megagrin.data_prep.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

# Characters with a meaning inside SentencePiece, or that normalisations change.
SPECIAL = [
    "\u2581",
    "\u2585",
    "\0",
    "\n",
    "\t",
    "\r",
    " ",
    "  ",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "\ufeff",
    "\u3000",
    "ﬁ",
    "e\u0301",
]
any_text = st.lists(st.text() | st.sampled_from(SPECIAL)).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_path)


@given(text=any_text)
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_round_trip_of_source(tokenizer: Tokenizer) -> None:
    source = inspect.getsource(textwrap) + "\n\tif x:\r\n\t    pass  \n\n\n"
    ids = tokenizer.encode(source)
    assert tokenizer.decode(ids) == source
    assert len(ids) < len(source) / 1.5  # it does compress: indentation is few tokens


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 2, 700)
    assert tokenizer.decode([1, *tokenizer.encode("x y"), 2]) == "x y"


def test_digits_are_single(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("2024")) == 4


def test_pickles_as_path(tokenizer: Tokenizer) -> None:
    data = pickle.dumps(tokenizer)
    assert len(data) < 500
    assert pickle.loads(data).encode("def f():\n") == tokenizer.encode("def f():\n")


@given(text=st.lists(st.sampled_from(["a", "def", " ", "\n", "\t", "return", "é"])).map("".join))
def test_cutting_changes_no_token(tokenizer: Tokenizer, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SEGMENT_CHARACTERS", 4)
        assert "".join(module._segments(text)) == text
        cut = tokenizer.encode(text)
    assert cut == tokenizer._processor.encode(text)


def test_a_foreign_model_keeps_its_own_rules(tmp_path: Path, corpus: Path) -> None:
    lines = [json.loads(line)["text"].replace("\n", " ") for line in corpus.read_text().splitlines()]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"), model_prefix=str(tmp_path / "m"), vocab_size=300, minloglevel=2,
        max_sentence_length=100_000,
    )  # fmt: skip
    foreign, plain = Tokenizer.load(tmp_path / "m.model"), sentencepiece.SentencePieceProcessor(str(tmp_path / "m.model"))
    text = "  two\nlines \u2581 here"
    assert foreign.encode(text) == plain.encode(text)


@pytest.mark.parametrize("token", [700, -1])
def test_decode_refuses_unknown_ids(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(ValueError, match=rf"token id {token} lies outside \[0, 700\)"):
        tokenizer.decode([5, token])


def test_lone_surrogate(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such tokenizer file"), (b"", "not a SentencePiece model"), (b"no", "not a S")]
)
def test_bad_model_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "t.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"t\.model: {message}"):
        Tokenizer.load(path)


def pieces(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer._processor.id_to_piece(token) for token in range(tokenizer.vocab_size)]


def test_training_does_not_depend_on_threads_or_repetition(tmp_path: Path, corpus: Path) -> None:
    def train(name: str, threads: int) -> list[str]:
        config = TokenizerConfig(str(tmp_path / name), 600, num_threads=threads, input_sentence_size=500)
        return pieces(train_tokenizer([str(corpus)], config))

    assert train("a", 1) == train("b", 3) == train("c", 1)


def test_jsonl_gz_and_text_train_alike(tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "text").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "text" / f"{number:04}.py").write_text(text)
    (tmp_path / "code.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps({"code": t}) + "\n" for t in texts).encode()))
    jsonl = TokenizerConfig(str(tmp_path / "a"), 500, text_key="code", num_threads=1)
    text = TokenizerConfig(str(tmp_path / "b"), 500, num_threads=1)
    assert pieces(train_tokenizer([str(tmp_path / "code.jsonl.gz")], jsonl)) == pieces(
        train_tokenizer([str(tmp_path / "text")], text)
    )


def test_long_lines_are_learnt_from(tmp_path: Path) -> None:
    """The trainer itself drops lines beyond its limit, and lines that hold U+2585 or NUL."""
    long = "wonderful " * 10_000 + "strange " * 10_000
    (tmp_path / "long.txt").write_text(long + "\n" + "\u2585 dignity \0 " * 8000)
    tokenizer = train_tokenizer([str(tmp_path / "long.txt")], TokenizerConfig(str(tmp_path / "m"), 300, num_threads=1))
    assert [len(tokenizer.encode(word)) for word in (" wonderful", " strange", " dignity")] == [1, 1, 1]


def train_text(tmp_path: Path, text: str, name: str = "a.jsonl", **options: object) -> Tokenizer:
    (tmp_path / name).write_text(text)
    return train_tokenizer([str(tmp_path / name)], TokenizerConfig(str(tmp_path / "m"), num_threads=1, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "options", "message"), [
    ('{"text": "a b"}\n{"text": 1', {}, r"a\.jsonl:2: malformed JSON"),
    ('{"text": "a b"}\n\n{"txt": "x"}', {}, r"a\.jsonl:3: no key 'text'; the object has \['txt'\]"),
    ('{"text": "\\ud800"}', {}, r"a\.jsonl:1: key 'text': lone surrogate"),
    ("", {}, "inputs: no text to train on"),
    ('{"text": "hello hello"}', {"vocab_size": 5000}, r"vocab_size: 5000 is too large for this corpus, which yields \d+ pieces"),
    ('{"text": "hello hello"}', {"vocab_size": 262}, r"vocab_size: 262 is too small: .* alone take 266 pieces"),
    ("", {"vocab_size": 260}, r"vocab_size: 260 must lie in \[261, 16777216\]"),
    ("", {"character_coverage": 1.5}, "character_coverage: 1.5 must lie in"),
    ("", {"input_sentence_size": -1}, "input_sentence_size: -1 must lie in"),
])  # fmt: skip
def test_training_errors(tmp_path: Path, text: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_text(tmp_path, text, **options)
    assert not list(tmp_path.glob("m*"))


def test_the_largest_vocabulary_of_the_message_works(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too large") as caught:
        train_text(tmp_path, "the cat sat on the mat\n" * 20, "a.txt", vocab_size=5000)
    limit = int(str(caught.value).split("yields ")[1].split()[0])
    assert train_text(tmp_path, "the cat sat on the mat\n" * 20, "a.txt", vocab_size=limit).vocab_size == limit


def test_an_existing_model_is_kept(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"output: .*m exists; pass --overwrite=true"):
        train_text(tmp_path, "a b c", "a.txt", vocab_size=265)
    assert (tmp_path / "m").read_bytes() == b"precious"
    assert train_text(tmp_path, "a b c", "a.txt", vocab_size=265, overwrite=True).vocab_size == 265
