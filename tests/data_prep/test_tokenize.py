"""Tokenizing: same bytes for any number of workers, each document once, one clear error for each fault, never a hang."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrin.data_prep.indexed import IndexedDataset
from megagrin.data_prep.sidecar import read_sidecar
from megagrin.data_prep.tokenize import TokenizeConfig, TokenizeReport, in_valid_split, tokenize
from megagrin.data_prep.tokenizer import Tokenizer

SUFFIXES = ("bin", "idx", "json")


def documents(prefix: Path | str) -> list[list[int]]:
    return [document.tolist() for document in IndexedDataset(prefix)]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def outputs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("out"))


def test_each_document_once_and_in_order(
    run: Callable[..., TokenizeReport], tmp_path: Path, corpus: Path, texts: list[str], tokenizer_path: Path
) -> None:
    tokenizer = Tokenizer.load(tokenizer_path)
    report = run(corpus, block_bytes=3000)
    assert documents(tmp_path / "out") == [[*tokenizer.encode(text), 2] for text in texts]
    assert report.outputs == {str(tmp_path / "out"): (len(texts), IndexedDataset(tmp_path / "out").tokens)}
    sidecar = read_sidecar(tmp_path / "out")
    assert sidecar is not None
    assert (sidecar.tokenizer_sha256, sidecar.vocab_size, sidecar.append_eos) == (tokenizer.sha256, 700, True)


def test_any_worker_count_gives_the_same_bytes(run: Callable[..., TokenizeReport], tmp_path: Path, corpus: Path) -> None:
    blocks = {"block_bytes": 20_000, "valid_fraction": 0.2}  # about 20 blocks
    for workers in (1, 2, 3):
        run(corpus, name=f"w{workers}", workers=workers, **blocks)
    for part in ("train", "valid"):
        for suffix in SUFFIXES:
            files = [(tmp_path / f"w{workers}_{part}.{suffix}").read_bytes() for workers in (1, 2, 3)]
            assert files[0] == files[1] == files[2]


@settings(max_examples=25)
@given(block_bytes=st.integers(1, 30_000))
def test_any_block_size_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_path: Path, token_file: str, block_bytes: int
) -> None:
    prefix = tmp_path_factory.mktemp("blocks") / "out"
    tokenize([str(corpus)], TokenizeConfig(str(prefix), str(tokenizer_path), workers=1), block_bytes=block_bytes)
    for suffix in SUFFIXES:
        assert Path(f"{prefix}.{suffix}").read_bytes() == Path(f"{token_file}.{suffix}").read_bytes()


def test_bos_and_eos(run: Callable[..., TokenizeReport], tmp_path: Path, tokenizer_path: Path) -> None:
    body = Tokenizer.load(tokenizer_path).encode("x = 1")
    path = jsonl(tmp_path / "a.jsonl", ["x = 1"])
    run(path, name="both", append_bos=True)
    run(path, name="none", append_eos=False)
    assert documents(tmp_path / "both") == [[1, *body, 2]]
    assert documents(tmp_path / "none") == [body]


def test_text_files_gzip_and_jsonl_agree(
    run: Callable[..., TokenizeReport], tmp_path: Path, corpus: Path, texts: list[str]
) -> None:
    folder = tmp_path / "sources" / "deep"
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        content = text.encode()
        path = folder / f"{number:04}.py"
        if number % 3:
            path.write_bytes(content)
        else:
            path.with_suffix(".py.gz").write_bytes(gzip.compress(content))
    (folder / ".hidden").write_bytes(b"\xff")
    (tmp_path / "code.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    run(corpus, name="plain")
    run(tmp_path / "sources", name="folder", block_bytes=5000)
    run(folder / "*.py*", name="glob", workers=2, block_bytes=20_000)
    run(tmp_path / "code.jsonl.gz", name="gz", workers=2, block_bytes=20_000)
    for name in ("folder", "glob", "gz"):
        assert documents(tmp_path / name) == documents(tmp_path / "plain")


@pytest.mark.parametrize(("file", "compress"), [
    ("a.jsonl.gz", gzip.compress),
    ("A.JSONL.GZ", gzip.compress),
    ("gzip.jsonl", gzip.compress),
    ("a.jsonl.bz2", bz2.compress),
    ("a.ndjson.BZ2", bz2.compress),
    ("bzip2.jsonl", bz2.compress),
    ("a.jsonl.xz", lzma.compress),
    ("xz.jsonl", lzma.compress),
])  # fmt: skip
def test_compressed_input_is_known_by_its_bytes(
    run: Callable[..., TokenizeReport], tmp_path: Path, corpus: Path, file: str, compress: Callable[[bytes], bytes]
) -> None:
    (tmp_path / file).write_bytes(compress(corpus.read_bytes()))
    run(corpus, name="plain")
    run(tmp_path / file, name="out", block_bytes=20_000)
    assert documents(tmp_path / "out") == documents(tmp_path / "plain")


def test_compressed_text_is_one_document(run: Callable[..., TokenizeReport], tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    run(tmp_path / "a.py", name="plain")
    for name, data in (("a.py.bz2", bz2.compress(b"x = 1\n")), ("a.py.XZ", lzma.compress(b"x = 1\n"))):
        (tmp_path / name).write_bytes(data)
        run(tmp_path / name, name="out", overwrite=True)
        assert documents(tmp_path / "out") == documents(tmp_path / "plain")


@pytest.mark.parametrize("options", [{}, {"append_bos": True}, {"append_eos": False}])
def test_the_framing_of_documents_is_recorded(
    run: Callable[..., TokenizeReport], tmp_path: Path, options: dict[str, bool]
) -> None:
    run(jsonl(tmp_path / "a.jsonl", ["one", ""]), **options)
    sidecar = read_sidecar(str(tmp_path / "out"))
    assert sidecar is not None
    first, empty = documents(tmp_path / "out")
    assert (sidecar.append_bos, sidecar.append_eos) == (first[0] == 1, first[-1] == 2)
    assert empty == []


def test_folders_made_for_nothing_are_removed(run: Callable[..., TokenizeReport], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("bad")
    with pytest.raises(ValueError, match="malformed"):
        run(tmp_path / "bad.jsonl", name="new/folder/out", valid_fraction=0.5)
    assert not (tmp_path / "new").exists()
    run(jsonl(tmp_path / "a.jsonl", ["one"]), name="new/folder/out")
    assert len(documents(tmp_path / "new/folder/out")) == 1


def test_what_a_left_link_points_to_is_not_written(run: Callable[..., TokenizeReport], tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    for suffix in SUFFIXES:
        (tmp_path / f"out.{suffix}.tmp").symlink_to("precious")
    run(jsonl(tmp_path / "a.jsonl", ["one"]))
    assert (tmp_path / "precious").read_text() == "precious"
    assert outputs(tmp_path) == ["out.bin", "out.idx", "out.json"]


def test_bom_crlf_nul_blank_lines_and_empty_texts(
    run: Callable[..., TokenizeReport], tmp_path: Path, tokenizer_path: Path
) -> None:
    tokenizer = Tokenizer.load(tokenizer_path)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": ""}\r\n{"text": "a\\u0000b\\u2028c"}')
    report = run(path)
    expected = [[*tokenizer.encode("one"), 2], [], [*tokenizer.encode("a\0b\u2028c"), 2]]
    assert documents(tmp_path / "out") == expected
    assert (report.empty, report.skipped) == (1, 0)


def test_valid_split(run: Callable[..., TokenizeReport], tmp_path: Path, corpus: Path, texts: list[str]) -> None:
    run(corpus, name="all")
    run(corpus, name="cut", valid_fraction=0.2, block_bytes=10_000)
    is_valid = in_valid_split(np.arange(len(texts), dtype=np.uint64), 0.2)
    everything = documents(tmp_path / "all")
    assert documents(tmp_path / "cut_valid") == [d for d, valid in zip(everything, is_valid, strict=True) if valid]
    assert documents(tmp_path / "cut_train") == [d for d, valid in zip(everything, is_valid, strict=True) if not valid]
    assert not (tmp_path / "cut.bin").exists()


def test_valid_split_share_and_stability() -> None:
    position = np.arange(200_000, dtype=np.uint64)
    small, large = in_valid_split(position, 0.01), in_valid_split(position, 0.1)
    assert abs(small.mean() - 0.01) < 0.001
    assert abs(large.mean() - 0.1) < 0.003
    assert not (small & ~large).any()  # growing the share moves no document back
    assert (in_valid_split(position[:1000], 0.1) == large[:1000]).all()


BAD_LINES = [
    (b'{"text": "b"', r"malformed JSON: .* at character 12"),
    (b"[" * 100_000, r"malformed JSON: nested too deeply"),
    (b'["text"]', r"a line must hold a JSON object, not list"),
    (b'{"txt": "b"}', r"no key 'text'; the object has \['txt'\]"),
    (b'{"text": 3}', r"key 'text' must hold a string, not int"),
    (b'{"text": null}', r"key 'text' must hold a string, not NoneType"),
    (b'{"text": "\xff"}', r"invalid UTF-8: invalid start byte at byte 10"),
    (b'{"text": "\\udc00"}', r"key 'text': lone surrogate at character 0"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[message[:20] for _, message in BAD_LINES])
def test_a_bad_line_stops_or_is_counted(run: Callable[..., TokenizeReport], tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "also"}\nworse\n')
    with pytest.raises(ValueError, match=rf"^[^\n]*a\.jsonl:3: {message}[^\n]*$"):
        run(path)
    assert outputs(tmp_path) == []
    report = run(path, on_error="skip", block_bytes=1)
    assert (report.skipped, len(documents(tmp_path / "out"))) == (2, 2)
    assert "a.jsonl:3: " in report.skip_messages[0]
    assert "a.jsonl:5: malformed JSON" in report.skip_messages[1]


def test_the_first_error_is_reported_by_any_worker_count(run: Callable[..., TokenizeReport], tmp_path: Path) -> None:
    lines = ['{"text": "x"}'] * 400
    lines[150], lines[151], lines[350] = "bad", '{"text": 1}', "bad"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for workers in (1, 3):
        with pytest.raises(ValueError, match=r"a\.jsonl:151: malformed JSON"):
            run(tmp_path / "a.jsonl", workers=workers, block_bytes=200)
    assert outputs(tmp_path) == []


def test_bad_text_files(run: Callable[..., TokenizeReport], tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"x = 1\xff")
    with pytest.raises(ValueError, match=r"a\.py: invalid UTF-8: invalid start byte at byte 5"):
        run(tmp_path / "a.py")
    whole = gzip.compress(b'{"text": "hello"}\n' * 1000)
    for name, data in (("cut.jsonl.gz", whole[:-10]), ("bad.jsonl.gz", b"not gzip"), ("cut.py.gz", whole[:-10])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}: truncated or damaged gzip file"):
            run(tmp_path / name)
    assert outputs(tmp_path) == []


def test_bad_inputs(run: Callable[..., TokenizeReport], tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "folder").mkdir()
    cases: list[tuple[tuple[Path | str, ...], str]] = [
        ((), "inputs: no files given"),
        ((tmp_path / "none.jsonl",), r"none\.jsonl: no such file or folder"),
        ((tmp_path / "*.txt",), r"\*\.txt: no file matches"),
        ((tmp_path / "folder",), "folder: no file matches"),
        ((path, tmp_path / "*.jsonl"), r"a\.jsonl is named twice"),
    ]
    for inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            run(*inputs)
    assert outputs(tmp_path) == []


@pytest.mark.parametrize(("content", "options", "message"), [
    ("", {}, r"inputs: no text in 0 documents \(0 skipped\)"),
    ('{"text": ""}\n', {}, r"inputs: no text in 1 documents"),
    ("bad\n", {"on_error": "skip"}, r"no text in 0 documents \(1 skipped\); the first skipped: .*a\.jsonl:1: malformed"),
    ('{"text": "x"}\n', {"valid_fraction": 0.001}, r"valid_fraction: 0.001 of 1 documents leaves no token for .*out_valid"),
    ("", {"valid_fraction": 1.0}, r"valid_fraction: 1.0 must lie in \[0, 1\)"),
    ("", {"workers": -1}, r"workers: -1 must lie in \[0, 1024\]"),
    ("", {"timeout": 0}, r"timeout: 0 must lie in \(0, "),
])  # fmt: skip
def test_nothing_to_write(
    run: Callable[..., TokenizeReport], tmp_path: Path, content: str, options: dict[str, object], message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a.jsonl", **options)
    assert outputs(tmp_path) == []


def test_existing_output_is_kept_unless_told(run: Callable[..., TokenizeReport], tmp_path: Path) -> None:
    one, two = jsonl(tmp_path / "1.jsonl", ["one"]), jsonl(tmp_path / "2.jsonl", ["two", "three"])
    run(one)
    before = documents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"output: .*out\.bin exists; pass --overwrite=true"):
        run(two)
    (tmp_path / "bad.jsonl").write_text("bad")
    with pytest.raises(ValueError, match="malformed"):
        run(tmp_path / "bad.jsonl", overwrite=True)
    assert documents(tmp_path / "out") == before
    run(two, overwrite=True)
    assert len(documents(tmp_path / "out")) == 2
