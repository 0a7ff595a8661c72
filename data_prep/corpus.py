"""Input documents: files, folders and globs of jsonl or plain text, cut into blocks that are parsed independently."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Literal

Format = Literal["auto", "jsonl", "text"]

BLOCK_BYTES = 4 << 20

_JSONL_SUFFIXES = {".jsonl", ".ndjson", ".json"}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Block:
    """A run of whole lines of one jsonl file, or a group of text files; small to send to another process.

    Args:
        paths: the jsonl file alone, or the text files.
        first_line: 1-based number of the first line; 0 for text files.
        offset: where the lines start in the file, in bytes.
        size: bytes of the lines.
        data: the lines themselves when the file cannot be read at an offset (gzip).
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
        ValueError: nothing given, a path that does not exist, a pattern or folder without files, or a file named twice.
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
    return files


def _expand(argument: str) -> list[Path]:
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


def is_jsonl(path: Path, file_format: Format) -> bool:
    """Whether a file holds one JSON object per line; `auto` goes by the suffix, with or without `.gz`."""
    if file_format != "auto":
        return file_format == "jsonl"
    return Path(path.name.removesuffix(".gz")).suffix in _JSONL_SUFFIXES


def read_blocks(files: Sequence[Path], file_format: Format, block_bytes: int) -> Iterator[Block]:
    """Cuts the files into blocks of about `block_bytes`, in order; the cut depends on nothing but the input.

    Raises:
        ValueError: a damaged gzip file.
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
    compressed = path.suffix == ".gz"
    with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) if compressed else raw as file:
        line, offset, consumed = 1, 0, 0
        while True:
            with _damage_named(path):
                lines = file.readlines(block_bytes)
            if not lines:
                return
            size = sum(map(len, lines))
            data = b"".join(lines) if compressed else None
            yield Block((str(path),), line, offset, size, data, raw.tell() - consumed)
            line, offset, consumed = line + len(lines), offset + size, raw.tell()


def raw_documents(block: Block) -> Iterator[tuple[str, bytes]]:
    """(where, bytes) of each document of a block; `where` is `file:line` or the file. Blank jsonl lines are left out.

    Raises:
        ValueError: a damaged gzip file.
        OSError: a file that cannot be read.
    """
    if not block.first_line:
        for name in block.paths:
            with _damage_named(name), gzip.open(name) if name.endswith(".gz") else Path(name).open("rb") as file:
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


def read_texts(inputs: Sequence[str], file_format: Format, text_key: str) -> Iterator[str]:
    """Every document's text in order, for a single reader.

    Raises:
        ValueError: as `expand_inputs`, `read_blocks` and `parse_document`, naming file and line.
    """
    for block in read_blocks(expand_inputs(inputs), file_format, BLOCK_BYTES):
        for where, raw in raw_documents(block):
            try:
                yield parse_document(raw, text_key if block.first_line else None)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error


@contextmanager
def _damage_named(path: str | Path) -> Iterator[None]:
    """Turns what the gzip module raises for a cut or corrupted file into an error that names the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: truncated or damaged gzip file: {error}") from error
