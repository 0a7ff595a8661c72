"""Token files: layout, round trip, merging, damage, crashes, and exchange with Megatron's own reader and writer."""

import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrin.data_prep.indexed import IndexedDataset, IndexedDatasetWriter, merge
from megagrin.data_prep.layout import token_dtype
from megagrin.data_prep.sidecar import Provenance, file_sha256, read_sidecar
from megagrin.data_prep.verify import verify

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6]]
documents_strategy = st.lists(st.lists(st.integers(0, 99), max_size=6), max_size=12)


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, vocab_size: int = 100, **provenance: str) -> str:
    with IndexedDatasetWriter(prefix, Provenance(vocab_size, **provenance)) as writer:
        for document in documents:
            writer.add(document)
    return str(prefix)


def contents(prefix: str | Path) -> list[list[int]]:
    return [document.tolist() for document in IndexedDataset(prefix)]


def test_layout_byte_by_byte(tmp_path: Path) -> None:
    write(tmp_path / "a")
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 4, 5, 6)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 5)
    expected += struct.pack("<3i", 3, 1, 2) + struct.pack("<3q", 0, 6, 8) + struct.pack("<5q", 0, 1, 1, 2, 3)
    assert (tmp_path / "a.idx").read_bytes() == expected


@pytest.mark.parametrize(("vocab_size", "dtype", "code"), [(65499, "<u2", 8), (65500, "<i4", 4)])
def test_dtype_follows_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: str, code: int) -> None:
    assert token_dtype(vocab_size) == np.dtype(dtype)
    write(tmp_path / "a", [[vocab_size - 1, 0]], vocab_size)
    assert (tmp_path / "a.idx").read_bytes()[17] == code
    assert (tmp_path / "a.bin").read_bytes() == np.array([vocab_size - 1, 0], dtype).tobytes()
    assert contents(tmp_path / "a") == [[vocab_size - 1, 0]]


@settings(max_examples=50)
@given(documents=documents_strategy)
def test_round_trip_one_by_one_and_in_bulk(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    folder = tmp_path_factory.mktemp("indexed")
    write(folder / "one", documents)
    with IndexedDatasetWriter(folder / "bulk", Provenance(100)) as writer:
        writer.add(list(chain(*documents)), [len(document) for document in documents])
    assert contents(folder / "one") == documents
    for suffix in ("bin", "idx", "json"):
        assert (folder / f"one.{suffix}").read_bytes() == (folder / f"bulk.{suffix}").read_bytes()
    dataset = IndexedDataset(folder / "one")
    assert dataset.documents == len(documents)
    assert dataset.tokens == sum(map(len, documents))


@settings(max_examples=50)
@given(parts=st.lists(documents_strategy, min_size=1, max_size=4))
def test_merge_is_writing_in_one_go(tmp_path_factory: pytest.TempPathFactory, parts: list[list[list[int]]]) -> None:
    folder = tmp_path_factory.mktemp("merge")
    merge([write(folder / f"part{number}", part) for number, part in enumerate(parts)], folder / "merged")
    write(folder / "whole", list(chain(*parts)))
    for suffix in ("bin", "idx", "json"):
        assert (folder / f"merged.{suffix}").read_bytes() == (folder / f"whole.{suffix}").read_bytes()


def test_merge_refuses_unlike_parts(tmp_path: Path) -> None:
    a = write(tmp_path / "a", tokenizer_sha256="0" * 64)
    b = write(tmp_path / "b", tokenizer_sha256="1" * 64)
    with pytest.raises(ValueError, match=r"b: made with .*1111.* but .*a with .*0000"):
        merge([a, b], tmp_path / "c")
    (tmp_path / "b.json").unlink()
    with pytest.raises(ValueError, match=r"b\.json: no such file"):
        merge([a, b], tmp_path / "c")
    assert not list(tmp_path.glob("c*"))


def test_sidecar(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a.b")  # a dot in the prefix is no suffix
    sidecar = read_sidecar(prefix)
    assert sidecar is not None
    assert (sidecar.vocab_size, sidecar.documents, sidecar.tokens, sidecar.bin_bytes) == (100, 4, 6, 12)
    assert sidecar.bin_sha256 == file_sha256(f"{prefix}.bin")
    assert sidecar.idx_sha256 == file_sha256(f"{prefix}.idx")


def test_a_sidecar_that_is_not_ours_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"lr": 1}')
    with pytest.raises(ValueError, match=r"a\.json exists and is not the sidecar"):
        write(tmp_path / "a")
    (tmp_path / "a.json").unlink()
    writer = IndexedDatasetWriter(tmp_path / "a", Provenance(100))
    writer.add([1])
    (tmp_path / "a.json").write_text('{"lr": 1}')  # it appears while the tokens are written
    with pytest.raises(ValueError, match=r"a\.json exists and is not the sidecar"), writer:
        writer.add([2])
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == '{"lr": 1}'


def test_a_prefix_must_name_a_file(tmp_path: Path) -> None:
    for prefix in ("", f"{tmp_path}/", str(tmp_path), f"{tmp_path}/.."):
        with pytest.raises(ValueError, match=r"must end in the name of a file|is a folder"):
            IndexedDatasetWriter(prefix, Provenance(100))
    assert list(tmp_path.iterdir()) == []


def test_pickles_as_prefix(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "a"))
    data = pickle.dumps(dataset)
    assert len(data) < 500
    assert [document.tolist() for document in pickle.loads(data)] == DOCUMENTS


def test_fingerprint_sees_changed_tokens(tmp_path: Path) -> None:
    first = IndexedDataset(write(tmp_path / "a", [[1, 2]])).fingerprint()
    assert IndexedDataset(write(tmp_path / "b", [[1, 2]])).fingerprint() == first
    assert IndexedDataset(write(tmp_path / "a", [[2, 1]])).fingerprint() != first


@pytest.mark.parametrize(("tokens", "lengths", "message"), [
    ([100], None, r"token id 100 lies outside \[0, vocab_size=100\)"),
    ([-1], None, r"token id -1 lies outside"),
    ([1, 2], [1], "lengths add up to 1, tokens to 2"),
])  # fmt: skip
def test_writer_refuses_bad_tokens(tmp_path: Path, tokens: list[int], lengths: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message), IndexedDatasetWriter(tmp_path / "a", Provenance(100)) as writer:
        writer.add(tokens, lengths)
    assert not list(tmp_path.iterdir())


def patch(path: Path, offset: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    path.write_bytes(raw)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


# Offsets for three sequences and five index entries: lengths at 34, pointers at 46, document index at 70, end at 110.
DAMAGE: list[tuple[str, Callable[[Path, Path], None], str]] = [
    ("bin cut", lambda b, i: cut(b, 11), r"a\.bin: 11 bytes, but its index describes 12"),
    ("bin longer", lambda b, i: b.write_bytes(b.read_bytes() + b"x"), r"a\.bin: 13 bytes, but its index describes 12"),
    ("bin missing", lambda b, i: b.unlink(), r"a\.bin: no such file"),
    ("idx missing", lambda b, i: i.unlink(), r"a\.idx: no such file"),
    ("idx empty", lambda b, i: cut(i, 0), r"a\.idx: 0 bytes, but a header alone has 34"),
    ("idx cut", lambda b, i: cut(i, 109), r"a\.idx: 109 bytes, but 3 sequences and 5 index entries take 110"),
    ("magic", lambda b, i: patch(i, 0, b"X"), r"a\.idx: starts with .*not a Megatron token index"),
    ("version", lambda b, i: patch(i, 9, b"\x02"), r"a\.idx: version 2, only 1"),
    ("float dtype", lambda b, i: patch(i, 17, b"\x07"), r"a\.idx: dtype code 7"),
    ("other dtype", lambda b, i: patch(i, 17, b"\x04"), r"a\.idx: sequence pointers"),
    ("negative length", lambda b, i: patch(i, 34, struct.pack("<i", -3)), r"a\.idx: negative sequence length -3"),
    ("length", lambda b, i: patch(i, 34, struct.pack("<i", 2)), r"a\.idx: sequence pointers"),
    ("pointer beyond the file", lambda b, i: patch(i, 54, struct.pack("<q", 1 << 40)), r"a\.idx: sequence pointers"),
    ("index does not rise", lambda b, i: patch(i, 78, struct.pack("<q", 3)), r"a\.idx: the document index must rise"),
    ("index ends early", lambda b, i: patch(i, 102, struct.pack("<q", 2)), r"a\.idx: .* sequence count 3"),
    ("index starts late", lambda b, i: patch(i, 70, struct.pack("<q", 1)), r"a\.idx: the document index must rise"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path, Path], None], message: str) -> None:
    write(tmp_path / "a")
    (tmp_path / "a.json").unlink()
    assert contents(tmp_path / "a") == DOCUMENTS
    damage(tmp_path / "a.bin", tmp_path / "a.idx")
    with pytest.raises(ValueError, match=message):
        IndexedDataset(tmp_path / "a")


def test_sidecar_finds_swapped_and_edited_files(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2], [3]])
    write(tmp_path / "b", [[1], [2, 3]])
    (tmp_path / "b.idx").replace(tmp_path / "a.idx")
    with pytest.raises(ValueError, match=r"a\.json: idx_sha256 is .* not of this pair"):
        IndexedDataset(tmp_path / "a")

    write(tmp_path / "a")
    patch(tmp_path / "a.bin", 4, b"\x07")
    assert len(IndexedDataset(tmp_path / "a")) == 4  # opening does not read all tokens; verify does
    with pytest.raises(ValueError, match=r"a\.bin: its SHA-256 is not the bin_sha256"):
        verify(tmp_path / "a")


@pytest.mark.parametrize(("change", "message"), [
    ({"tokens": 5}, "tokens is 5, but the token files have 6"),
    ({"documents": "4"}, "documents: '4' has the wrong type"),
    ({"surprise": 1}, "expected exactly the fields"),
])  # fmt: skip
def test_bad_sidecar(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = Path(write(tmp_path / "a") + ".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"a\.json: {message}"):
        IndexedDataset(tmp_path / "a")


def test_an_error_leaves_the_old_pair(tmp_path: Path) -> None:
    write(tmp_path / "a")
    writer = IndexedDatasetWriter(tmp_path / "a", Provenance(100))
    writer.add([9])
    with pytest.raises(ValueError, match="token id 100"), writer:
        writer.add([100])
    assert contents(tmp_path / "a") == DOCUMENTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx", "a.json"]


KILLED_WRITER = """
import os, signal, sys
from megagrin.data_prep.indexed import IndexedDatasetWriter
from megagrin.data_prep.sidecar import Provenance
with IndexedDatasetWriter(sys.argv[1], Provenance(100)) as writer:
    writer.add([7, 8])
    if sys.argv[2] == "finished":
        writer.finish()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["writing", "finished"])
def test_a_killed_writer_leaves_no_pair_and_the_next_one_works(tmp_path: Path, moment: str) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED_WRITER, tmp_path / "a", moment], timeout=60, check=False)
    assert run.returncode == -signal.SIGKILL
    assert all(path.suffix == ".tmp" for path in tmp_path.iterdir())
    write(tmp_path / "a")
    assert contents(tmp_path / "a") == DOCUMENTS
    assert not list(tmp_path.glob("*.tmp"))


def test_second_writer_of_the_same_files_takes_over(tmp_path: Path) -> None:
    first = IndexedDatasetWriter(tmp_path / "a", Provenance(100))
    first.add([1])
    with IndexedDatasetWriter(tmp_path / "a", Provenance(100)) as second:
        with pytest.raises(ValueError, match=r"a\.bin\.tmp: another process"), first:
            first.add([2])
        second.add([3])
    assert contents(tmp_path / "a") == [[3]]


FULL_DISK = """
import resource, signal, sys
import numpy as np
from megagrin.data_prep.indexed import IndexedDatasetWriter
from megagrin.data_prep.sidecar import Provenance
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
try:
    with IndexedDatasetWriter(sys.argv[1], Provenance(100)) as writer:
        writer.add(np.ones(1 << 18, np.int64))
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a file size limit")
def test_a_failed_write_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / "a"], timeout=60, capture_output=True, text=True, check=True
    )
    assert "a.bin.tmp" in run.stdout
    assert not list(tmp_path.iterdir())


def test_offsets_beyond_4_gib(tmp_path: Path) -> None:
    """Three sequences of 3 GB each in a sparse file: 32-bit arithmetic on bytes or tokens would wrap."""
    length = 1_500_000_000
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    pointers = [0, 2 * length, 4 * length]
    index = header + struct.pack("<3i", *[length] * 3) + struct.pack("<3q", *pointers) + struct.pack("<4q", 0, 1, 2, 3)
    (tmp_path / "a.idx").write_bytes(index)
    with (tmp_path / "a.bin").open("wb") as file:
        file.truncate(6 * length)
        file.seek(4 * length)
        file.write(struct.pack("<2H", 11, 12))
    dataset = IndexedDataset(tmp_path / "a")
    assert dataset.tokens == 3 * length
    assert dataset[2][:3].tolist() == [11, 12, 0]
    os.truncate(tmp_path / "a.bin", 6 * length - 2)
    with pytest.raises(ValueError, match=rf"{6 * length - 2} bytes, but its index describes {6 * length}"):
        IndexedDataset(tmp_path / "a")


def test_the_writer_counts_beyond_4_gib(tmp_path: Path) -> None:
    """Only the index, as 9 GB of tokens are too many for a test."""
    length = 1_500_000_000
    writer = IndexedDatasetWriter(tmp_path / "a", Provenance(100))
    writer._extend_index(np.full(3, length, np.int64), np.arange(1, 4))
    writer.finish()
    index = (tmp_path / "a.idx.tmp").read_bytes()
    assert struct.unpack("<3q", index[46:70]) == (0, 2 * length, 4 * length)


def test_megatron_reads_ours(tmp_path: Path) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    theirs = megatron.IndexedDataset(write(tmp_path / "a"))
    assert theirs.document_indices.tolist() == [0, 1, 1, 2, 3]
    assert [theirs[number].tolist() for number in range(len(theirs))] == [d for d in DOCUMENTS if d]


@pytest.mark.parametrize("vocab_size", [100, 70000])
def test_we_read_and_match_megatrons(tmp_path: Path, vocab_size: int) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=megatron.DType.optimal_dtype(vocab_size))
    for document in DOCUMENTS:
        if document:
            builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert contents(tmp_path / "theirs") == DOCUMENTS
    write(tmp_path / "ours", vocab_size=vocab_size)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
