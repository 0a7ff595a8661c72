"""Megatron's `.bin/.idx` layout: header and index of a pair of token files, and where a pair may be written.

`<prefix>.bin` holds the tokens back to back. `<prefix>.idx`, little endian: magic (9 bytes), version (u64, 1), dtype
code (u8), sequence count S (u64), length of the document index D = documents + 1 (u64), sequence lengths (S × int32,
tokens), sequence pointers (S × int64, byte offsets into `.bin`), document index (D × int64: document d is the sequences
[index[d], index[d + 1])).
Source: megatron/core/datasets/indexed_dataset.py of Megatron-Core 0.16.

Array suffixes: T tokens, N documents, S sequences, D = N + 1.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagrin.data_prep.files import check_absent, check_name, check_targets
from megagrin.data_prep.sidecar import Sidecar, read_sidecar, refuse_foreign, sidecar_path

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
# Megatron's own border: from here on its readers and writers expect int32, although uint16 would still hold the id.
_UINT16_VOCAB = 65500
# Tokens read at a time.
COPY_TOKENS = 1 << 24

Int64Array = npt.NDArray[np.int64]
TokenArray = npt.NDArray[np.integer]


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron stores ids of this vocabulary in: uint16 below 65500 entries, else int32."""
    return np.dtype("<u2" if vocab_size < _UINT16_VOCAB else "<i4")


def pair_paths(prefix: str | Path) -> tuple[Path, Path]:
    """(`<prefix>.bin`, `<prefix>.idx`); a dot in the prefix is kept."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def id_range(tokens_T: TokenArray) -> tuple[int, int]:
    """(smallest, largest) id, found in bounded pieces; (0, -1) when there is none."""
    pieces = [tokens_T[start : start + COPY_TOKENS] for start in range(0, tokens_T.size, COPY_TOKENS)]
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
    bin_path, idx_path = existing_pair(prefix)
    dtype, sequences, entries = read_header(idx_path)
    size = 0
    if sequences:
        body = np.memmap(idx_path, np.uint8, mode="r")[HEADER.size : HEADER.size + 12 * sequences]
        size = int(body[-8:].view("<i8")[0]) + int(body[4 * sequences - 4 : 4 * sequences].view("<i4")[0]) * dtype.itemsize
    check_size(bin_path, size)
    outline = Outline(str(prefix), dtype, entries - 1, size // dtype.itemsize, read_sidecar(prefix))
    if outline.sidecar is not None:
        check_sidecar(outline.sidecar, prefix, outline.documents, outline.tokens, dtype)
    return outline


def check_output_prefix(prefix: str, sources: Iterable[str | Path], *, overwrite: bool) -> None:
    """Refuses a prefix under which token files must not or cannot be written.

    Args:
        prefix: path without suffix of the files to be written.
        sources: files that are read.
        overwrite: whether token files of this prefix may be replaced; other files never are.

    Raises:
        ValueError: as `check_name`, `check_targets` and `check_absent`, or a file of that name is none of ours.
    """
    check_name(prefix)
    bin_path, idx_path = pair_paths(prefix)
    targets = (bin_path, idx_path, sidecar_path(prefix))
    check_targets(targets, sources)
    refuse_foreign(prefix)
    if idx_path.exists():
        with idx_path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError(f"{idx_path} exists and is no token index, which would take its place")
    if not overwrite:
        check_absent(targets)


def existing_pair(prefix: str | Path) -> tuple[Path, Path]:
    """`pair_paths` of files that are there, or a ValueError that names the missing one."""
    bin_path, idx_path = pair_paths(prefix)
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise ValueError(f"{path}: no such file (a prefix is the path of a pair without .bin and .idx)")
    return bin_path, idx_path


def check_size(bin_path: Path, expected: int) -> None:
    """A ValueError when `.bin` has not the bytes that its index describes."""
    actual = bin_path.stat().st_size
    if expected != actual:
        raise ValueError(f"{bin_path}: {actual} bytes, but its index describes {expected}: truncated or not of this pair")


def read_header(path: Path) -> tuple[np.dtype, int, int]:
    """(token dtype, sequences, entries of the document index) of an `.idx` file, held against its size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise ValueError(f"{path}: {size} bytes, but a header alone has {HEADER.size}: truncated")
    magic, version, code, sequences, entries = HEADER.unpack(header)
    if magic != MAGIC:
        raise ValueError(f"{path}: starts with {magic!r}, not {MAGIC!r}: not a Megatron token index")
    if version != VERSION:
        raise ValueError(f"{path}: version {version}, only {VERSION} is known")
    if code not in CODES:
        raise ValueError(f"{path}: dtype code {code} is not one of the integer codes {sorted(CODES)}")
    expected = HEADER.size + 12 * sequences + 8 * entries
    if size != expected:
        raise ValueError(f"{path}: {size} bytes, but {sequences} sequences and {entries} index entries take {expected}")
    if not entries:
        raise ValueError(f"{path}: the document index is empty, but even without documents it has one entry")
    return np.dtype(CODES[code]), sequences, entries


def read_index(path: Path) -> tuple[np.dtype, npt.NDArray[np.int32], Int64Array, Int64Array]:
    """(token dtype, sequence lengths, sequence pointers, document index) of an `.idx` file, each checked on its own."""
    dtype, sequences, _ = read_header(path)
    # Mapped, not read: the ranks of a node share the pages.
    body = np.memmap(path, np.uint8, mode="r")[HEADER.size :]
    lengths_S = body[: 4 * sequences].view("<i4")
    pointers_S = body[4 * sequences : 12 * sequences].view("<i8")
    index_D = body[12 * sequences :].view("<i8")
    if lengths_S.size and lengths_S.min() < 0:
        raise ValueError(f"{path}: negative sequence length {lengths_S.min()}")
    if index_D[0] != 0 or index_D[-1] != sequences or (np.diff(index_D) < 0).any():
        raise ValueError(f"{path}: the document index must rise from 0 to the sequence count {sequences}")
    return dtype, lengths_S, pointers_S, index_D


def check_sidecar(sidecar: Sidecar, prefix: str | Path, documents: int, tokens: int, dtype: np.dtype) -> None:
    """Holds the counts of a sidecar against those of the files; `check_recorded` raises."""
    for name, actual in (
        ("documents", documents),
        ("tokens", tokens),
        ("bin_bytes", tokens * dtype.itemsize),
    ):
        check_recorded(sidecar, prefix, name, actual)


def check_recorded(sidecar: Sidecar, prefix: str | Path, name: str, actual: int | str) -> None:
    """Refuses a pair whose sidecar records something else under `name`.

    Raises:
        ValueError: names the sidecar and both values.
    """
    recorded = getattr(sidecar, name)
    if recorded != actual:
        raise ValueError(f"{sidecar_path(prefix)}: {name} is {recorded}, but the token files have {actual}: not of this pair")
