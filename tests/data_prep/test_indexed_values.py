"""Token files against Megatron's own type codes, sizes beyond the format, copies in pieces, and bounds of a document's number."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from megagrin.data_prep import indexed, layout
from megagrin.data_prep.indexed import IndexedDataset, IndexedDatasetWriter, merge
from megagrin.data_prep.sidecar import Provenance

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6, 7, 8, 9]]


def write(prefix: Path, documents: list[list[int]]) -> Path:
    with IndexedDatasetWriter(prefix, Provenance(100)) as writer:
        for document in documents:
            writer.add(document)
    return prefix


@pytest.mark.parametrize(
    "name", ["uint8", "int8", "int16", "int32", "int64", "uint16"]
)  # float64 and float32 are Megatron's codes 6 and 7
def test_every_integer_type_of_megatron_is_read(tmp_path: Path, name: str) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    dtype = getattr(np, name)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
    for document in DOCUMENTS:
        if document:
            builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    dataset = IndexedDataset(tmp_path / "a")
    assert dataset.tokens_T.dtype == dtype
    assert [document.tolist() for document in dataset] == DOCUMENTS
    assert dataset.sidecar is None
    assert dataset.token_id_range() == (1, 9)


def test_a_document_beyond_the_format_is_refused(tmp_path: Path) -> None:
    """Sequence lengths are int32. The tokens are one byte seen 2^31 times: nothing is copied before the refusal."""
    many = np.broadcast_to(np.uint8(1), 2**31)
    with (
        pytest.raises(ValueError, match="a document of 2147483648 tokens exceeds the format's 2147483647"),
        IndexedDatasetWriter(tmp_path / "a", Provenance(100)) as writer,
    ):
        writer.add(many)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("piece", [1, 2, 3, 8, 9, 100])
def test_pieces_of_any_size_give_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Copying and scanning in bounded pieces sees every token once."""
    parts = [write(tmp_path / "a", DOCUMENTS), write(tmp_path / "b", [[50], [2]])]
    whole = write(tmp_path / "whole", [*DOCUMENTS, [50], [2]])
    for module in (indexed, layout):
        monkeypatch.setattr(module, "COPY_TOKENS", piece)
    merge(parts, tmp_path / "merged")
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"merged.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()
    assert IndexedDataset(whole).token_id_range() == (1, 50)


def test_the_range_of_ids(tmp_path: Path) -> None:
    assert IndexedDataset(write(tmp_path / "empty", [])).token_id_range() == (0, -1)
    assert IndexedDataset(write(tmp_path / "hollow", [[], []])).token_id_range() == (0, -1)
    assert IndexedDataset(write(tmp_path / "a", [[99, 7], [7]])).token_id_range() == (7, 99)


def test_ids_at_the_ends_of_the_vocabulary(tmp_path: Path) -> None:
    """[0, vocab_size): both ends are named by their own id when they are left."""
    assert [document.tolist() for document in IndexedDataset(write(tmp_path / "a", [[0, 99]]))] == [[0, 99]]
    for bad, tokens in ((100, [0, 100]), (-1, [-1, 100])):
        with pytest.raises(ValueError, match=rf"token id {bad} lies outside \[0, vocab_size=100\)"):
            write(tmp_path / "b", [tokens])


def test_documents_are_numbered_from_zero(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "a", DOCUMENTS))
    assert len(dataset) == 4
    assert dataset[0].tolist() == [1, 2, 3]
    assert dataset[3].tolist() == [5, 6, 7, 8, 9]
    for number in (-1, 4):
        with pytest.raises(IndexError, match=rf"a: document {number} lies outside \[0, 4\)"):
            dataset[number]
    assert dataset.document_offsets_D.tolist() == [0, 3, 3, 4, 9]
    assert dataset.sequence_lengths_S.tolist() == [3, 1, 5]
    assert dataset.document_index_D.tolist() == [0, 1, 1, 2, 3]


def test_folders_of_a_prefix_are_made(tmp_path: Path) -> None:
    for _ in range(2):  # the second time they are there
        write(tmp_path / "x" / "y" / "a", [[1]])
    assert sorted(path.name for path in (tmp_path / "x" / "y").iterdir()) == ["a.bin", "a.idx", "a.json"]


def test_the_fingerprint_is_the_hash_of_the_checksums(tmp_path: Path) -> None:
    """It lies in checkpoints: another formula would refuse every old run."""
    prefix = write(tmp_path / "a", DOCUMENTS)
    sums = [hashlib.sha256((tmp_path / f"a.{suffix}").read_bytes()).hexdigest() for suffix in ("idx", "bin")]
    assert IndexedDataset(prefix).fingerprint() == hashlib.sha256(" ".join(sums).encode()).hexdigest()
    (tmp_path / "a.json").unlink()
    assert IndexedDataset(prefix).fingerprint() == sums[0]


def test_merging_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prefixes: no token files given"):
        merge([], tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    """The tokens of months of work are mapped by every rank."""
    dataset = IndexedDataset(write(tmp_path / "a", DOCUMENTS))
    with pytest.raises(ValueError, match="read-only"):
        dataset.tokens_T[0] = 1


def test_an_error_inside_the_writer_is_not_swallowed(tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with IndexedDatasetWriter(tmp_path / "a", Provenance(100)) as writer:
            writer.add([1, 2])
            raise KeyError

    with pytest.raises(KeyError):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []
