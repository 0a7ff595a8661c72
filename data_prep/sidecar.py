"""The facts kept beside a pair of token files: `<prefix>.json`, with counts, vocabulary, options and checksums."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from megagrin.data_prep.files import open_new, temporary_path

_HASH_CHUNK = 1 << 22


@dataclass(frozen=True)
class Provenance:
    """What made the tokens; two token files may be merged when theirs are equal.

    Args:
        vocab_size: number of token ids the tokenizer can emit.
        tokenizer_sha256: SHA-256 of the tokenizer's file, or None when it is not known.
        append_bos: whether each document starts with the tokenizer's bos id.
        append_eos: whether each document ends with the tokenizer's eos id.
    """

    vocab_size: int
    tokenizer_sha256: str | None = None
    append_bos: bool = False
    append_eos: bool = False


@dataclass(frozen=True)
class Sidecar(Provenance):
    """Contents of `<prefix>.json`: the provenance, and counts and checksums of the pair.

    Args:
        documents: number of documents, empty ones included.
        tokens: number of tokens.
        bin_bytes: size of `<prefix>.bin`.
        bin_sha256: SHA-256 of `<prefix>.bin`.
        idx_sha256: SHA-256 of `<prefix>.idx`.
    """

    documents: int = 0
    tokens: int = 0
    bin_bytes: int = 0
    bin_sha256: str = ""
    idx_sha256: str = ""

    def provenance(self) -> Provenance:
        """The part that says what made the tokens."""
        return Provenance(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Provenance)})


def sidecar_path(prefix: str | Path) -> Path:
    """`<prefix>.json`; a dot in the prefix is kept."""
    return Path(f"{prefix}.json")


def write_sidecar(prefix: str | Path, sidecar: Sidecar) -> None:
    """Writes `<prefix>.json` by way of a temporary name, so that it is whole or absent."""
    path = sidecar_path(prefix)
    temporary = temporary_path(path)
    with open_new(temporary) as file:
        file.write(f"{json.dumps(dataclasses.asdict(sidecar), indent=2)}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_sidecar(prefix: str | Path) -> Sidecar | None:
    """The sidecar of a pair of token files, or None when there is none (files written by another program).

    Raises:
        ValueError: the file is not JSON, or a field is missing, unknown or of the wrong type.
    """
    path = sidecar_path(prefix)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    fields = {field.name: field.type for field in dataclasses.fields(Sidecar)}
    if not isinstance(raw, dict) or raw.keys() != fields.keys():
        found = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{path}: expected exactly the fields {sorted(fields)}, found {found}")
    for name, kind in fields.items():
        if type(raw[name]) is not kind and not (name == "tokenizer_sha256" and isinstance(raw[name], str | None)):
            raise ValueError(f"{path}: {name}: {raw[name]!r} has the wrong type")
    return Sidecar(**raw)


def refuse_foreign(prefix: str | Path) -> None:
    """Refuses to take the place of a `<prefix>.json` that is somebody's own file.

    Raises:
        ValueError: it exists and is no sidecar.
    """
    path = sidecar_path(prefix)
    try:
        read_sidecar(prefix)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} exists and is not the sidecar of token files, which would take its place") from error


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(_HASH_CHUNK):
            digest.update(piece)
    return digest.hexdigest()
