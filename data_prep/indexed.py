"""Token files in Megatron's `.bin/.idx` layout: a streaming writer and a validating memory-mapped reader.

`<prefix>.bin` holds the tokens back to back. `<prefix>.idx`, little endian: magic (9 bytes), version (u64, 1), dtype
code (u8), sequence count S (u64), length of the document index D = documents + 1 (u64), sequence lengths (S × int32,
tokens), sequence pointers (S × int64, byte offsets into `.bin`), document index (D × int64: document d is the sequences
[index[d], index[d + 1])).
Source: megatron/core/datasets/indexed_dataset.py of Megatron-Core 0.16.

Array suffixes: T tokens, N documents, S sequences, D = N + 1.
"""

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from megagrin.data_prep.sidecar import Provenance, Sidecar, file_sha256, read_sidecar, sidecar_path, write_sidecar

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_INT32_MAX = 2**31 - 1
# Megatron's own border: from here on its readers and writers expect int32, although uint16 would still hold the id.
_UINT16_VOCAB = 65500
_COPY_TOKENS = 1 << 24

Int64Array = npt.NDArray[np.int64]
TokenArray = npt.NDArray[np.integer]


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron stores ids of this vocabulary in: uint16 below 65500 entries, else int32."""
    return np.dtype("<u2" if vocab_size < _UINT16_VOCAB else "<i4")


def pair_paths(prefix: str | Path) -> tuple[Path, Path]:
    """(`<prefix>.bin`, `<prefix>.idx`); a dot in the prefix is kept."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class IndexedDatasetWriter:
    """Streams documents into a pair of token files and its sidecar.

    A context manager. Everything goes to `<name>.tmp` and is renamed when the block ends without an error: an old pair
    of the same name stays untouched until then, and no crash leaves a half pair under the final names. Leftovers of a
    killed run are replaced. Memory: 4 bytes per sequence and 8 per document.

    Args:
        prefix: path without suffix; its folder is created.
        provenance: what made the tokens; its `vocab_size` fixes the dtype.

    Raises:
        ValueError: (at the end) another process took over the temporary files.
        OSError: the disk is full or not writable.
    """

    def __init__(self, prefix: str | Path, provenance: Provenance):
        self.prefix = Path(prefix)
        self.provenance = provenance
        self.dtype = token_dtype(provenance.vocab_size)
        self.documents = 0
        self.tokens = 0
        self._sequences = 0
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._document_ends: list[Int64Array] = []
        self._hash = hashlib.sha256()
        self._finished = False
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._temporary_bin, self._temporary_idx = (Path(f"{path}.tmp") for path in pair_paths(prefix))
        self._temporary_bin.unlink(missing_ok=True)
        self._bin = self._temporary_bin.open("xb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
                self._publish()
        finally:
            self._discard()

    def add(self, tokens_T: npt.ArrayLike, lengths_N: npt.ArrayLike | None = None) -> None:
        """Appends documents, each as one sequence (an empty document has none).

        Args:
            tokens_T: ids of all documents back to back.
            lengths_N: tokens of each document; None when `tokens_T` is one document.

        Raises:
            ValueError: an id lies outside [0, vocab_size), a document exceeds 2^31 - 1 tokens, or the lengths do not
                add up.
        """
        tokens_T = np.asarray(tokens_T)
        if not tokens_T.size:
            tokens_T = tokens_T.astype(self.dtype)
        lengths_N = np.asarray([tokens_T.size] if lengths_N is None else lengths_N, dtype=np.int64)
        if lengths_N.sum() != tokens_T.size:
            raise ValueError(f"{self.prefix}: document lengths add up to {lengths_N.sum()}, tokens to {tokens_T.size}")
        if lengths_N.size and lengths_N.max() > _INT32_MAX:
            raise ValueError(f"{self.prefix}: a document of {lengths_N.max()} tokens exceeds the format's {_INT32_MAX}")
        nonempty_N = lengths_N > 0
        self._write(tokens_T)
        self._extend_index(lengths_N[nonempty_N], np.cumsum(nonempty_N, dtype=np.int64))

    def add_dataset(self, dataset: "IndexedDataset") -> None:
        """Appends every document of another pair with its sequences as they are; copies tokens in bounded pieces."""
        for start in range(0, dataset.tokens, _COPY_TOKENS):
            self._write(dataset.tokens_T[start : start + _COPY_TOKENS])
        self._extend_index(dataset.sequence_lengths_S, dataset.document_index_D[1:])

    def _extend_index(self, lengths_S: npt.NDArray[np.integer], document_ends_N: Int64Array) -> None:
        self._lengths.append(lengths_S.astype(np.int32))
        self._document_ends.append(document_ends_N + self._sequences)
        self._sequences += lengths_S.size
        self.documents += document_ends_N.size

    def _write(self, tokens_T: TokenArray) -> None:
        if tokens_T.size and not (tokens_T.min() >= 0 and tokens_T.max() < self.provenance.vocab_size):
            bad = tokens_T.min() if tokens_T.min() < 0 else tokens_T.max()
            raise ValueError(f"{self.prefix}: token id {bad} lies outside [0, vocab_size={self.provenance.vocab_size})")
        data = tokens_T.astype(self.dtype).tobytes()
        with _naming(self._temporary_bin):
            self._bin.write(data)
        self._hash.update(data)
        self.tokens += tokens_T.size

    def finish(self) -> None:
        """Writes the index and brings both temporary files to disk; nothing appears under the final names yet."""
        if self._finished:
            return
        lengths_S = np.concatenate([np.empty(0, np.int32), *self._lengths])
        index_D = np.concatenate([np.zeros(1, np.int64), *self._document_ends])
        pointers_S = (np.cumsum(lengths_S, dtype=np.int64) - lengths_S) * self.dtype.itemsize
        code = next(code for code, name in _CODES.items() if np.dtype(name) == self.dtype)
        with _naming(self._temporary_idx), self._temporary_idx.open("wb") as idx:
            idx.write(_HEADER.pack(MAGIC, VERSION, code, lengths_S.size, index_D.size))
            for array, layout in ((lengths_S, "<i4"), (pointers_S, "<i8"), (index_D, "<i8")):
                idx.write(array.astype(layout, copy=False).data)
            idx.flush()
            os.fsync(idx.fileno())
        with _naming(self._temporary_bin):
            self._bin.flush()
            os.fsync(self._bin.fileno())
        self._finished = True

    def _publish(self) -> None:
        if not self._owns_temporary():
            raise ValueError(f"{self._temporary_bin}: another process is writing the same token files")
        bin_path, idx_path = pair_paths(self.prefix)
        sidecar = Sidecar(
            **vars(self.provenance),
            documents=self.documents,
            tokens=self.tokens,
            bin_bytes=self.tokens * self.dtype.itemsize,
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=file_sha256(self._temporary_idx),
        )
        # The index leaves first and comes last: a crash in between leaves a lone `.bin`, never an old index
        # with new tokens.
        sidecar_path(self.prefix).unlink(missing_ok=True)
        idx_path.unlink(missing_ok=True)
        self._temporary_bin.replace(bin_path)
        self._temporary_idx.replace(idx_path)
        write_sidecar(self.prefix, sidecar)

    def _owns_temporary(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._bin.fileno()), self._temporary_bin.stat())
        except FileNotFoundError:
            return False

    def _discard(self) -> None:
        owned = self._owns_temporary()
        with suppress(OSError):  # a full disk was reported by the write that met it
            self._bin.close()
        if owned:
            self._temporary_bin.unlink(missing_ok=True)
            self._temporary_idx.unlink(missing_ok=True)


class IndexedDataset:
    """Memory-mapped, validated reader of a pair of token files, written by megagrin or by Megatron.

    Opening reads the whole index once, checks it against itself, against the size of `.bin` and, where there is a
    sidecar, against its counts and the checksum of the index. Tokens stay on disk. Pickles as its prefix.

    Attributes:
        tokens_T: all tokens, in the dtype of the file.
        document_offsets_D: int64, document d is tokens_T[offsets[d] : offsets[d + 1]].
        sequence_lengths_S: int32.
        document_index_D: int64, first sequence of each document, and the sequence count.
        sidecar: contents of `<prefix>.json`, or None.

    Raises:
        ValueError: a file is missing, damaged, truncated or does not belong to the other; the message names it.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        bin_path, idx_path = _existing_pair(prefix)
        dtype, self.sequence_lengths_S, pointers_S, self.document_index_D = _read_index(idx_path)
        ends_S = np.cumsum(self.sequence_lengths_S, dtype=np.int64)
        if not np.array_equal(pointers_S, (ends_S - self.sequence_lengths_S) * dtype.itemsize):
            raise ValueError(f"{idx_path}: sequence pointers do not follow from the sequence lengths")
        self.document_offsets_D: Int64Array = np.concatenate([np.zeros(1, np.int64), ends_S])[self.document_index_D]
        self.tokens = int(self.document_offsets_D[-1])
        self.documents = self.document_index_D.size - 1
        _check_size(bin_path, self.tokens * dtype.itemsize)
        self.sidecar = read_sidecar(prefix)
        if self.sidecar is not None:
            _check_sidecar(self.sidecar, self, dtype)
            _check_recorded(self.sidecar, prefix, "idx_sha256", file_sha256(idx_path))
        # An empty file cannot be mapped.
        self.tokens_T: TokenArray = np.memmap(bin_path, dtype, mode="r") if self.tokens else np.empty(0, dtype)

    def __len__(self) -> int:
        return self.documents

    def __getitem__(self, document: int) -> TokenArray:
        """Tokens of one document, a view into the file."""
        if not 0 <= document < self.documents:
            raise IndexError(f"{self.prefix}: document {document} lies outside [0, {self.documents})")
        return self.tokens_T[self.document_offsets_D[document] : self.document_offsets_D[document + 1]]

    def __iter__(self) -> Iterator[TokenArray]:
        return map(self.__getitem__, range(self.documents))

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[str]]:
        return IndexedDataset, (self.prefix,)

    def token_id_range(self) -> tuple[int, int]:
        """(smallest, largest) id of the file by a full scan in bounded pieces, (0, -1) when it is empty."""
        return id_range(self.tokens_T)

    def fingerprint(self) -> str:
        """SHA-256 that changes when the data do: of the recorded checksums; without a sidecar of the index alone."""
        if self.sidecar is None:
            return file_sha256(pair_paths(self.prefix)[1])
        return hashlib.sha256(f"{self.sidecar.idx_sha256} {self.sidecar.bin_sha256}".encode()).hexdigest()


def id_range(tokens_T: TokenArray) -> tuple[int, int]:
    """(smallest, largest) id, found in bounded pieces; (0, -1) when there is none."""
    pieces = [tokens_T[start : start + _COPY_TOKENS] for start in range(0, tokens_T.size, _COPY_TOKENS)]
    smallest = min((int(piece.min()) for piece in pieces), default=0)
    return smallest, max((int(piece.max()) for piece in pieces), default=-1)


@dataclass(frozen=True)
class Outline:
    """What a pair of token files says of itself in its header, its last index entries and its sidecar.

    Args:
        prefix: path without suffix.
        dtype: of the tokens.
        documents: documents, empty ones included.
        tokens: tokens.
        sidecar: contents of `<prefix>.json`, or None.
    """

    prefix: str
    dtype: np.dtype
    documents: int
    tokens: int
    sidecar: Sidecar | None

    def first_tokens(self, count: int) -> TokenArray:
        """The first `count` tokens, or all of them, mapped."""
        count = min(count, self.tokens)
        return np.memmap(pair_paths(self.prefix)[0], self.dtype, mode="r", shape=(count,)) if count else np.empty(0, self.dtype)


def read_outline(prefix: str | Path) -> Outline:
    """Counts and provenance of a pair of token files, by a few reads whatever its size.

    Raises:
        ValueError: as `IndexedDataset`, as far as header, sizes and sidecar tell.
    """
    bin_path, idx_path = _existing_pair(prefix)
    dtype, sequences, entries = _read_header(idx_path)
    size = 0
    if sequences:
        body = np.memmap(idx_path, np.uint8, mode="r")[_HEADER.size : _HEADER.size + 12 * sequences]
        size = int(body[-8:].view("<i8")[0]) + int(body[4 * sequences - 4 : 4 * sequences].view("<i4")[0]) * dtype.itemsize
    _check_size(bin_path, size)
    outline = Outline(str(prefix), dtype, entries - 1, size // dtype.itemsize, read_sidecar(prefix))
    if outline.sidecar is not None:
        _check_sidecar(outline.sidecar, outline, dtype)
    return outline


def merge(prefixes: Sequence[str | Path], output: str | Path) -> None:
    """Joins pairs of one tokenizer into one, documents in the order given.

    Raises:
        ValueError: a part is damaged, has no sidecar, or was made with another tokenizer or options than the first.
    """
    parts = [IndexedDataset(prefix) for prefix in prefixes]
    if not parts:
        raise ValueError("merge: no token files given")
    origins = []
    for part in parts:
        if part.sidecar is None:
            raise ValueError(f"{sidecar_path(part.prefix)}: no such file; merging needs to know what made the tokens")
        origins.append(part.sidecar.provenance())
        if origins[-1] != origins[0]:
            raise ValueError(f"{part.prefix}: made with {origins[-1]}, but {parts[0].prefix} with {origins[0]}")
    with IndexedDatasetWriter(output, origins[0]) as writer:
        for part in parts:
            writer.add_dataset(part)


def _existing_pair(prefix: str | Path) -> tuple[Path, Path]:
    bin_path, idx_path = pair_paths(prefix)
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise ValueError(f"{path}: no such file (a prefix is the path of a pair without .bin and .idx)")
    return bin_path, idx_path


def _check_size(bin_path: Path, expected: int) -> None:
    actual = bin_path.stat().st_size
    if expected != actual:
        raise ValueError(f"{bin_path}: {actual} bytes, but its index describes {expected}: truncated or not of this pair")


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    """(token dtype, sequences, entries of the document index) of an `.idx` file, held against its size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise ValueError(f"{path}: {size} bytes, but a header alone has {_HEADER.size}: truncated")
    magic, version, code, sequences, entries = _HEADER.unpack(header)
    if magic != MAGIC:
        raise ValueError(f"{path}: starts with {magic!r}, not {MAGIC!r}: not a Megatron token index")
    if version != VERSION:
        raise ValueError(f"{path}: version {version}, only {VERSION} is known")
    if code not in _CODES:
        raise ValueError(f"{path}: dtype code {code} is not one of the integer codes {sorted(_CODES)}")
    expected = _HEADER.size + 12 * sequences + 8 * entries
    if size != expected:
        raise ValueError(f"{path}: {size} bytes, but {sequences} sequences and {entries} index entries take {expected}")
    if not entries:
        raise ValueError(f"{path}: the document index is empty, but even without documents it has one entry")
    return np.dtype(_CODES[code]), sequences, entries


def _read_index(path: Path) -> tuple[np.dtype, npt.NDArray[np.int32], Int64Array, Int64Array]:
    """(token dtype, sequence lengths, sequence pointers, document index) of an `.idx` file, each checked on its own."""
    dtype, sequences, _ = _read_header(path)
    # Mapped, not read: the ranks of a node share the pages.
    body = np.memmap(path, np.uint8, mode="r")[_HEADER.size :]
    lengths_S = body[: 4 * sequences].view("<i4")
    pointers_S = body[4 * sequences : 12 * sequences].view("<i8")
    index_D = body[12 * sequences :].view("<i8")
    if lengths_S.size and lengths_S.min() < 0:
        raise ValueError(f"{path}: negative sequence length {lengths_S.min()}")
    if index_D[0] != 0 or index_D[-1] != sequences or (np.diff(index_D) < 0).any():
        raise ValueError(f"{path}: the document index must rise from 0 to the sequence count {sequences}")
    return dtype, lengths_S, pointers_S, index_D


def _check_sidecar(sidecar: Sidecar, pair: IndexedDataset | Outline, dtype: np.dtype) -> None:
    for name, actual in (
        ("documents", pair.documents),
        ("tokens", pair.tokens),
        ("bin_bytes", pair.tokens * dtype.itemsize),
    ):
        _check_recorded(sidecar, pair.prefix, name, actual)


def _check_recorded(sidecar: Sidecar, prefix: str | Path, name: str, actual: int | str) -> None:
    recorded = getattr(sidecar, name)
    if recorded != actual:
        raise ValueError(f"{sidecar_path(prefix)}: {name} is {recorded}, but the token files have {actual}: not of this pair")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name into a write error: the operating system's own message for a full disk has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
