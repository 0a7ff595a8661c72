"""SentencePiece byte-pair encoding that is lossless: training wrapper and `Tokenizer`.

Text is never normalised: decode(encode(text)) == text for every string that UTF-8 can hold. Newline and tab are pieces
of their own, so that a long document can be cut after a newline without changing its tokens.
"""

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import sentencepiece

from megagrin.data_prep.corpus import Format, expand_inputs, read_texts
from megagrin.data_prep.files import (
    check_absent,
    check_name,
    check_targets,
    make_folder,
    named,
    open_new,
    remove_empty,
    temporary_path,
)
from megagrin.data_prep.sidecar import file_sha256

_MAX_THREADS = 1024
_FEWEST_PIECES = 261  # unk, bos, eos, newline, tab and 256 bytes
_MOST_PIECES = 1 << 24  # the trainer works for minutes before it says that it has no text for more
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
# SentencePiece stores a space as this character, so in text it would come back as a space.
_SPACE_SYMBOL = "\u2581"
# The trainer passes over sentences with these (its mark of unknown pieces, and NUL); both are spelt in bytes anyway.
_UNTRAINABLE = re.compile("[\u2585\0]")
# Four UTF-8 bytes a character at most: below the 65,535 at which the trainer has crashed (sentencepiece issue 340).
_SENTENCE_CHARACTERS = 16000
# Cutting makes a 10 MB document 2.5 times as fast to encode, and bounds the memory (35 bytes per byte of text).
_SEGMENT_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class TokenizerConfig:
    """Training of a SentencePiece BPE tokenizer.

    Args:
        output: path of the model file to write, for example data/tokenizer.model.
        vocab_size: number of pieces: unk, bos, eos, newline, tab, 256 bytes, the characters and the merges.
        text_key: key of the text in each JSON object.
        format: jsonl, text (one file is one document) or auto (by suffix: .jsonl, .ndjson and .json are jsonl).
        character_coverage: share of the characters' occurrences that get an own piece; the rest is spelt in bytes.
        input_sentence_size: lines sampled uniformly for training, which bounds the memory; 0 takes every line.
        num_threads: training threads, 0 for one per core. The pieces do not depend on it.
        overwrite: replace an existing output.
    """

    output: str
    vocab_size: int = 32000
    text_key: str = "text"
    format: Format = "auto"
    character_coverage: float = 0.9995
    input_sentence_size: int = 10_000_000
    num_threads: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        # SentencePiece's own limits, which it answers by file and line of its source.
        for name, low, high in (
            ("vocab_size", _FEWEST_PIECES, _MOST_PIECES),
            ("character_coverage", 0.98, 1),
            ("input_sentence_size", 0, 2**63 - 1),
            ("num_threads", 0, _MAX_THREADS),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: {getattr(self, name)} must lie in [{low}, {high}]")


class Tokenizer:
    """A SentencePiece model. Pickles as its path.

    Lossless for models of `train_tokenizer`; a model trained elsewhere keeps its own normalisation.

    Attributes:
        vocab_size: number of pieces.
        bos_id, eos_id, unk_id: special ids, -1 where the model has none.
        sha256: of the model file.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such tokenizer file")
        model = Path(path).read_bytes()
        try:
            if not model:
                raise RuntimeError("the file is empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            reason = "" if model else ": the file is empty"  # SentencePiece itself only names a line of its source
            raise ValueError(f"{path}: not a SentencePiece model{reason}") from error
        self.sha256 = file_sha256(path)
        self.vocab_size: int = self._processor.get_piece_size()
        self.unk_id: int = self._processor.unk_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self._space_symbol_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_SYMBOL.encode()]
        self._lossless = self._is_lossless()

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a model file.

        Raises:
            ValueError: the file is missing or is no SentencePiece model.
        """
        return cls(path)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str]]:
        return Tokenizer, (self.path,)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without bos or eos.

        Raises:
            ValueError: the text holds a lone surrogate, which UTF-8 cannot express.
        """
        try:
            if not self._lossless:
                return self._processor.encode(text)
            ids: list[int] = []
            for number, part in enumerate(text.split(_SPACE_SYMBOL)):
                if number:
                    ids += self._space_symbol_ids
                for segment in _segments(part):
                    ids += self._processor.encode(segment)
            return ids
        except RuntimeError as error:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as cause:
                raise ValueError(f"lone surrogate at character {cause.start}, which UTF-8 cannot express") from cause
            raise ValueError(f"SentencePiece cannot encode the text: {error}") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special ids vanish, bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id outside [0, vocab_size).
        """
        ids = [int(token) for token in ids]
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            bad = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(f"token id {bad} lies outside [0, {self.vocab_size}) of {self.path}")
        return self._processor.decode(ids)

    def _is_lossless(self) -> bool:
        """Whether no piece crosses a newline, no space is put in front, and bytes stand for unknown characters."""
        pieces = (self._processor.id_to_piece(token) for token in range(self.vocab_size))
        if self.unk_id in self._space_symbol_ids or any("\n" in piece and piece != "\n" for piece in pieces):
            return False
        whole = "a  b\n \n c "
        return self._processor.decode(self._processor.encode(whole)) == whole and self._processor.encode(whole) == [
            token for line in whole.splitlines(keepends=True) for token in self._processor.encode(line)
        ]


def _segments(text: str) -> Iterator[str]:
    """Cuts a long text after newlines, into pieces of at most `_SEGMENT_CHARACTERS` where its lines allow."""
    start = 0
    while len(text) - start > _SEGMENT_CHARACTERS:
        end = text.rfind("\n", start, start + _SEGMENT_CHARACTERS) + 1
        end = end or text.find("\n", start + _SEGMENT_CHARACTERS) + 1
        if not end:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def train_tokenizer(inputs: Sequence[str], config: TokenizerConfig) -> Tokenizer:
    """Trains a tokenizer on files, folders or globs and writes `config.output`, whole or not at all.

    Raises:
        ValueError: bad inputs (file and line named), an empty corpus, an existing output, or a `vocab_size` that the
            corpus cannot fill or that is too small for its characters.
    """
    files = expand_inputs(inputs)
    output = Path(config.output)
    with named("output"):
        check_name(config.output)
        check_targets([output], files)
        if not config.overwrite:
            check_absent([output])
    with _published(output) as file:
        file.write(_train(_Sentences(read_texts(files, config.format, config.text_key)), config))
    return Tokenizer.load(output)


@contextmanager
def _published(output: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends without an error; opened before the block, or not at all."""
    temporary = temporary_path(output)
    with named("output"):
        folders = make_folder(output)
        try:
            file = open_new(temporary)
        except OSError:
            remove_empty(folders)
            raise
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(output)
    except BaseException:
        temporary.unlink(missing_ok=True)
        remove_empty(folders)
        raise


def _train(sentences: "_Sentences", config: TokenizerConfig) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, **_trainer_options(config)
        )
    except RuntimeError as error:
        if sentences.error is not None:
            raise sentences.error from error
        if not sentences.count:
            raise ValueError("inputs: no text to train on") from error
        raise ValueError(_explain(str(error), config.vocab_size)) from error
    return model.getvalue()


def _trainer_options(config: TokenizerConfig) -> dict[str, Any]:
    return {
        "model_type": "bpe",
        "vocab_size": config.vocab_size,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["\n", "\t"],
        "max_sentence_length": 4 * _SENTENCE_CHARACTERS,
        "character_coverage": config.character_coverage,
        "input_sentence_size": config.input_sentence_size,
        "shuffle_input_sentence": True,
        "num_threads": config.num_threads or min(os.cpu_count() or 1, _MAX_THREADS),
        "unk_id": UNK_ID,
        "bos_id": BOS_ID,
        "eos_id": EOS_ID,
        "pad_id": -1,
        "minloglevel": 2,
    }


class _Sentences:
    """The lines of texts as the trainer takes them: long ones in pieces, since it drops what exceeds its limit.

    The trainer turns an exception of its iterator into a RuntimeError, so the first one is kept here.
    """

    def __init__(self, texts: Iterable[str]):
        self._texts = texts
        self.count = 0
        self.error: ValueError | OSError | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                yield from self._cut(text)
        except (ValueError, OSError) as error:
            self.error = error
            raise

    def _cut(self, text: str) -> Iterator[str]:
        for line in text.split("\n"):
            for part in _UNTRAINABLE.split(line):
                for start in range(0, len(part), _SENTENCE_CHARACTERS):
                    self.count += 1
                    yield part[start : start + _SENTENCE_CHARACTERS]


def _explain(message: str, vocab_size: int) -> str:
    if limit := re.search(r"value <= (\d+)", message):
        return f"vocab_size: {vocab_size} is too large for this corpus, which yields {limit[1]} pieces at most"
    if needed := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size: {vocab_size} is too small: special ids, bytes and characters alone take {needed[1]} pieces; "
            "raise it or lower character_coverage"
        )
    return f"SentencePiece training failed: {message}"
