"""Checks and summaries of finished token files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megagrin.data_prep.indexed import IndexedDataset, Outline, pair_paths
from megagrin.data_prep.sidecar import file_sha256, sidecar_path

_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class VerifyReport:
    """What was checked of a pair of token files.

    Args:
        documents: documents, empty ones included.
        tokens: tokens.
        max_token_id: largest id.
        vocab_size: the vocabulary the ids were held against, None when neither a sidecar nor a tokenizer names one.
        checksums: whether the files were compared with recorded checksums.
    """

    documents: int
    tokens: int
    max_token_id: int
    vocab_size: int | None
    checksums: bool


def verify(prefix: str | Path, tokenizer_path: str | Path | None = None) -> VerifyReport:
    """Reads a pair of token files completely and checks structure, sizes, checksums and ids.

    Args:
        prefix: path without suffix.
        tokenizer_path: the tokenizer that the sidecar must name, and whose vocabulary the ids must fit.

    Raises:
        ValueError: the first thing found wrong, naming the file.
    """
    dataset = IndexedDataset(prefix)
    bin_path, _ = pair_paths(prefix)
    if dataset.sidecar is not None and file_sha256(bin_path) != dataset.sidecar.bin_sha256:
        raise ValueError(f"{bin_path}: its SHA-256 is not the bin_sha256 of {sidecar_path(prefix)}: the tokens were changed")
    vocab_size = dataset.sidecar.vocab_size if dataset.sidecar is not None else None
    if tokenizer_path is not None:
        from megagrin.data_prep.tokenizer import Tokenizer  # training imports this file, and need not have sentencepiece

        check_tokenizer(dataset, tokenizer_path)
        vocab_size = Tokenizer.load(tokenizer_path).vocab_size
    smallest, largest = dataset.token_id_range()
    if smallest < 0 or (vocab_size is not None and largest >= vocab_size):
        bad = smallest if smallest < 0 else largest
        raise ValueError(f"{bin_path}: token id {bad} lies outside [0, vocab_size={vocab_size})")
    return VerifyReport(dataset.documents, dataset.tokens, largest, vocab_size, dataset.sidecar is not None)


def check_tokenizer(dataset: IndexedDataset | Outline, tokenizer_path: str | Path) -> None:
    """Refuses token files that another tokenizer made; of files whose sidecar does not know, only that there is a tokenizer.

    Raises:
        ValueError: no such file, or its checksum is not the one of the sidecar.
    """
    if not Path(tokenizer_path).is_file():
        raise ValueError(f"{tokenizer_path}: no such tokenizer file")
    recorded = dataset.sidecar.tokenizer_sha256 if dataset.sidecar is not None else None
    if recorded is None:
        return
    actual = file_sha256(tokenizer_path)
    if actual != recorded:
        raise ValueError(
            f"{tokenizer_path} has SHA-256 {actual[:12]}, but {sidecar_path(dataset.prefix)} records "
            f"{recorded[:12]}: the tokens were made with another tokenizer"
        )


def summary(dataset: IndexedDataset) -> list[tuple[str, str]]:
    """(name, value) rows of a pair of token files: counts, dtype, percentiles of document lengths, provenance."""
    lengths_N = np.diff(dataset.document_offsets_D)
    rows = [
        ("documents", f"{dataset.documents:,} ({int((lengths_N == 0).sum()):,} empty)"),
        ("tokens", f"{dataset.tokens:,}"),
        ("dtype", str(dataset.tokens_T.dtype)),
    ]
    if lengths_N.size:
        values = np.percentile(lengths_N, _PERCENTILES, method="nearest")
        rows += [(f"length, {p}th percentile", f"{int(v):,}") for p, v in zip(_PERCENTILES, values, strict=True)]
    if dataset.sidecar is not None:
        rows += [(name, str(value)) for name, value in vars(dataset.sidecar.provenance()).items()]
    return rows
