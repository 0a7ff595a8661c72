"""Data preparation against values from outside: SplitMix64's published outputs, numbers of a file counted by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from megagrin.data_prep.indexed import IndexedDataset, IndexedDatasetWriter
from megagrin.data_prep.layout import HEADER, MAGIC, VERSION
from megagrin.data_prep.sidecar import Provenance, read_sidecar
from megagrin.data_prep.tokenize import in_valid_split
from megagrin.data_prep.tokenizer import _SEGMENT_CHARACTERS, _segments
from megagrin.data_prep.verify import VerifyReport, summary, verify

# The first outputs of the generator with seed 0, as its authors' C code prints them.
SPLITMIX64 = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]


def write(prefix: Path, documents: list[list[int]], provenance: Provenance | None = None) -> Path:
    with IndexedDatasetWriter(prefix, provenance or Provenance(100)) as writer:
        for document in documents:
            writer.add(document)
    return prefix


@pytest.mark.parametrize(("position", "word"), list(enumerate(SPLITMIX64)))
def test_the_hash_of_a_document_is_splitmix64(position: int, word: int) -> None:
    """A fraction whose 53 bits lie just above the hash takes the document, one just below does not."""
    below = (word >> 11) * 2.0**-53
    assert in_valid_split(np.array([position], np.uint64), below + 2.0**-53).tolist() == [True]
    assert in_valid_split(np.array([position], np.uint64), below).tolist() == [False]


@pytest.mark.parametrize("with_sidecar", [True, False])
def test_what_verify_reports(tmp_path: Path, with_sidecar: bool) -> None:
    """Id 0 is an id; the largest one and the vocabulary are those of the file."""
    prefix = write(tmp_path / "a", [[0, 7, 3], [], [42]])
    if not with_sidecar:
        prefix.with_suffix(".json").unlink()
    assert verify(prefix) == VerifyReport(3, 4, 42, 100 if with_sidecar else None, with_sidecar)


def test_percentiles_are_lengths_that_occur(tmp_path: Path) -> None:
    """Eight documents of 1, 2, 4 … 128 tokens: a percentile is the nearest one's length, never between two."""
    dataset = IndexedDataset(write(tmp_path / "a", [[1] * 2**n for n in range(8)]))
    rows = dict(summary(dataset))
    assert (rows["documents"], rows["tokens"], rows["dtype"]) == ("8 (0 empty)", "255", "uint16")
    lengths = {percent: rows[f"length, {percent}th percentile"] for percent in (0, 5, 25, 50, 75, 95, 100)}
    assert lengths == {0: "1", 5: "1", 25: "4", 50: "16", 75: "32", 95: "128", 100: "128"}


def test_a_sequence_without_tokens_is_megatrons_to_write(tmp_path: Path) -> None:
    """Ours never writes one; Megatron's builder does for an empty item."""
    np.array([5, 6], "<u2").tofile(tmp_path / "a.bin")
    lengths, pointers, documents = np.array([1, 0, 1], "<i4"), np.array([0, 2, 2], "<i8"), np.array([0, 1, 2, 3], "<i8")
    body = b"".join(array.tobytes() for array in (lengths, pointers, documents))
    (tmp_path / "a.idx").write_bytes(HEADER.pack(MAGIC, VERSION, 8, 3, 4) + body)
    assert [document.tolist() for document in IndexedDataset(tmp_path / "a")] == [[5], [], [6]]


@pytest.mark.parametrize("value", [5, ["a"], True])
def test_a_checksum_is_a_text_or_unknown(tmp_path: Path, value: object) -> None:
    sidecar = write(tmp_path / "a", [[1]]).with_suffix(".json")
    content = json.loads(sidecar.read_text())
    assert content["tokenizer_sha256"] is None
    assert sidecar.read_text() == json.dumps(content, indent=2) + "\n"
    sidecar.write_text(json.dumps(content | {"tokenizer_sha256": value}))
    with pytest.raises(ValueError, match=r"tokenizer_sha256: .* has the wrong type"):
        read_sidecar(tmp_path / "a")


def test_segments_are_as_long_as_their_lines_allow() -> None:
    """Cut after the last newline within the bound; a longer line stays whole; nothing is lost."""
    line = "x" * (_SEGMENT_CHARACTERS // 4 - 1) + "\n"
    long = "y" * (_SEGMENT_CHARACTERS + 5) + "\n"
    assert [len(part) for part in _segments(line * 9)] == [_SEGMENT_CHARACTERS, _SEGMENT_CHARACTERS, len(line)]
    assert list(_segments(line + long + line)) == [line, long, line]
    assert list(_segments(long[:-1])) == [long[:-1]]
    assert "".join(_segments(line * 3 + long + line * 7)) == line * 3 + long + line * 7
