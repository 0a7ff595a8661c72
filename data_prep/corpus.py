"""Input documents: files, folders and globs of jsonl or plain text, cut into blocks that are parsed independently."""

import bz2
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import BinaryIO, Literal, cast

from megagrin.data_prep.files import named

Format = Literal["auto", "jsonl", "text"]

BLOCK_BYTES = 4 << 20

_JSONL_SUFFIXES = {".jsonl", ".ndjson", ".json"}
# A file is recognised by how it begins, whatever it is called; bzip2 with its block's mark, as `BZh` could begin a text.
_COMPRESSIONS = {
    ".gz": ("gzip", (b"\x1f\x8b",)),
    ".bz2": ("bzip2", tuple(b"BZh%d%b" % (level, mark) for level in range(1, 10) for mark in (b"1AY&SY", b"\x17rE8P\x90"))),
    ".xz": ("xz", (b"\xfd7zXZ\0",)),
}
# What a text cannot begin with, and what to say of it.
_UNREADABLE = {
    b"\x28\xb5\x2f\xfd": "zstd; decompress it first (zstd -d)",
    b"\x04\x22\x4d\x18": "lz4; decompress it first (lz4 -d)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"ARROW1\0\0": "an Arrow file; write its text as jsonl first",
    b"Obj\x01": "an Avro file; write its text as jsonl first",
}
_UNREADABLE_SUFFIXES = {
    ".zst": "zstd; decompress it first (zstd -d)",
    ".lz4": "lz4; decompress it first (lz4 -d)",
    ".parquet": "parquet; write its text as jsonl first",
    ".arrow": "an Arrow file; write its text as jsonl first",
    ".zip": "a zip archive; unpack it first",
    ".tar": "a tar archive; unpack it first",
    ".tgz": "a tar archive; unpack it first",
}
_HEAD_BYTES = 512
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Block:
    """A run of whole lines of one jsonl file, or a group of text files; small to send to another process.

    Args:
        paths: the jsonl file alone, or the text files.
        first_line: 1-based number of the first line; 0 for text files.
        offset: where the lines start in the file, in bytes.
        size: bytes of the lines.
        data: the lines themselves when the file cannot be read at an offset (compressed).
        consumed: input bytes this block stands for, for the progress bar.
    """

    paths: tuple[str, ...]
    first_line: int = 0
    offset: int = 0
    size: int = 0
    data: bytes | None = None
    consumed: int = 0


def expand_inputs(inputs: Sequence[str]) -> list[Path]:
    """The files that the arguments name: a folder stands for all its files but hidden ones, a glob for its matches.

    Each argument's files are sorted and the order of the arguments is kept: it never depends on the file system.

    Raises:
        ValueError: nothing given, a path that does not exist, a pattern or folder without files, a file named twice, or one
            of a kind that cannot be read.
    """
    if not inputs:
        raise ValueError("inputs: no files given")
    files = [path for argument in inputs for path in _expand(argument)]
    seen: dict[Path, Path] = {}
    for path in files:
        real = path.resolve()
        if real in seen:
            raise ValueError(f"inputs: {path} is named twice (also as {seen[real]}); its documents would be repeated")
        seen[real] = path
    with named("inputs"):
        for path in files:
            _refuse_unreadable(path)
    return files


def _expand(argument: str) -> list[Path]:
    if not argument:
        raise ValueError("inputs: '' names no file")
    path = Path(argument)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if not _is_hidden(file.relative_to(path))]
    elif has_magic(argument):
        found = [Path(name) for name in glob(argument, recursive=True)]
    else:
        raise ValueError(f"inputs: {argument}: no such file or folder")
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise ValueError(f"inputs: {argument}: no file matches")
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _refuse_unreadable(path: Path) -> None:
    """A ValueError for a file whose bytes are no text in a form that can be read: by its first bytes, then by its name."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        file.seek(0, os.SEEK_END)
        size = file.tell()
        file.seek(max(0, size - 4))
        tail = file.read(4)
    kinds = [kind for magic, kind in _UNREADABLE.items() if head.startswith(magic)]
    if head.startswith(b"PAR1") and tail == b"PAR1":
        kinds.append(_UNREADABLE_SUFFIXES[".parquet"])
    suffix = compression(path)
    if suffix is not None:
        if not size:
            raise ValueError(f"{path}: truncated or damaged {_COMPRESSIONS[suffix][0]} file: it is empty")
        with _damage_named(path), open_input(path) as file:
            head = file.read(_HEAD_BYTES)
    if head[257:262] == b"ustar":
        kinds.append(_UNREADABLE_SUFFIXES[".tar"])
    kinds += [kind for suffix, kind in _UNREADABLE_SUFFIXES.items() if path.suffix.lower() == suffix]
    if kinds:
        raise ValueError(f"{path}: is {kinds[0]}")


def compression(path: Path) -> str | None:
    """The suffix of the compression that a file begins like, or else bears in its name; None for plain files."""
    with path.open("rb") as file:
        head = file.read(10)
    for suffix, (_, magics) in _COMPRESSIONS.items():
        if head.startswith(magics):
            return suffix
    return path.suffix.lower() if path.suffix.lower() in _COMPRESSIONS else None


@contextmanager
def open_input(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed."""
    suffix = compression(path)
    with path.open("rb") as raw, _decompressed(raw, suffix) as file:
        yield file


def _decompressed(raw: BinaryIO, suffix: str | None) -> BinaryIO:
    if suffix is None:
        return raw
    if suffix == ".gz":
        return cast("BinaryIO", gzip.open(raw, "rb"))
    return cast("BinaryIO", bz2.open(raw, "rb") if suffix == ".bz2" else lzma.open(raw, "rb"))


def is_jsonl(path: Path, file_format: Format) -> bool:
    """Whether a file holds one JSON object per line; `auto` goes by the suffix, with or without that of a compression."""
    if file_format != "auto":
        return file_format == "jsonl"
    name = Path(path.name.lower())
    return Path(name.stem if name.suffix in _COMPRESSIONS else name).suffix in _JSONL_SUFFIXES


def read_blocks(files: Sequence[Path], file_format: Format, block_bytes: int) -> Iterator[Block]:
    """Cuts the files into blocks of about `block_bytes`, in order; the cut depends on nothing but the input.

    Raises:
        ValueError: a damaged compressed file.
        OSError: a file that cannot be read.
    """
    group: list[str] = []
    group_bytes = 0
    for path in files:
        if is_jsonl(path, file_format):
            if group:
                yield Block(tuple(group), consumed=group_bytes)
                group, group_bytes = [], 0
            yield from _jsonl_blocks(path, block_bytes)
            continue
        group.append(str(path))
        group_bytes += path.stat().st_size
        if group_bytes >= block_bytes:
            yield Block(tuple(group), consumed=group_bytes)
            group, group_bytes = [], 0
    if group:
        yield Block(tuple(group), consumed=group_bytes)


def _jsonl_blocks(path: Path, block_bytes: int) -> Iterator[Block]:
    suffix = compression(path)
    with path.open("rb") as raw, _decompressed(raw, suffix) as file:
        line, offset, consumed = 1, 0, 0
        while True:
            with _damage_named(path):
                lines = file.readlines(block_bytes)
            if not lines:
                return
            size = sum(map(len, lines))
            data = b"".join(lines) if suffix is not None else None
            yield Block((str(path),), line, offset, size, data, raw.tell() - consumed)
            line, offset, consumed = line + len(lines), offset + size, raw.tell()


def raw_documents(block: Block) -> Iterator[tuple[str, bytes]]:
    """(where, bytes) of each document of a block; `where` is `file:line` or the file. Blank jsonl lines are left out.

    Raises:
        ValueError: a damaged compressed file.
        OSError: a file that cannot be read.
    """
    if not block.first_line:
        for name in block.paths:
            with _damage_named(name), open_input(Path(name)) as file:
                raw = file.read()
            yield name, raw.removeprefix(_BOM)
        return
    (name,) = block.paths
    data = block.data
    if data is None:
        with Path(name).open("rb") as file:
            file.seek(block.offset)
            data = file.read(block.size)
    if block.first_line == 1:
        data = data.removeprefix(_BOM)
    for number, line in enumerate(data.split(b"\n"), block.first_line):
        if line.strip():
            yield f"{name}:{number}", line


def parse_document(raw: bytes, text_key: str | None) -> str:
    """The text of a document: of a JSON object's `text_key`, or of the bytes themselves when `text_key` is None.

    Raises:
        ValueError: invalid UTF-8, malformed JSON, no object, no such key, or a value that is no Unicode string.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8: {error.reason} at byte {error.start}") from error
    if text_key is None:
        return text
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise ValueError("malformed JSON: nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"a line must hold a JSON object, not {type(record).__name__}")
    if text_key not in record:
        raise ValueError(f"no key {text_key!r}; the object has {sorted(record)}")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"key {text_key!r} must hold a string, not {type(text).__name__}")
    try:
        text.encode("utf-8")  # JSON can escape half of a surrogate pair
    except UnicodeEncodeError as error:
        raise ValueError(f"key {text_key!r}: lone surrogate at character {error.start}") from error
    return text


def read_texts(files: Sequence[Path], file_format: Format, text_key: str) -> Iterator[str]:
    """Every document's text in order, for a single reader.

    Raises:
        ValueError: as `read_blocks` and `parse_document`, naming file and line.
    """
    for block in read_blocks(files, file_format, BLOCK_BYTES):
        for where, raw in raw_documents(block):
            try:
                yield parse_document(raw, text_key if block.first_line else None)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error


@contextmanager
def _damage_named(path: str | Path) -> Iterator[None]:
    """Turns what the standard library raises for a cut or corrupted compressed file into an error that names the file."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's own: not what the file holds
            raise
        suffix = compression(Path(path))
        assert suffix is not None, "plain files are not decompressed"
        raise ValueError(f"{path}: truncated or damaged {_COMPRESSIONS[suffix][0]} file: {error}") from error
