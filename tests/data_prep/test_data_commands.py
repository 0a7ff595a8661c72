"""`megagrin data …`: the commands end to end, what verify finds, and how errors end."""

import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megagrin.data_prep.commands import main
from megagrin.data_prep.indexed import IndexedDataset


def test_from_text_to_inspected_token_files(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], texts: list[str]
) -> None:
    model, prefix = str(tmp_path / "t.model"), str(tmp_path / "code")
    assert main(["train-tokenizer", str(corpus), "--output", model, "--vocab_size=500", "--num_threads=1"]) == 0
    assert f"{model}: 500 pieces" in capsys.readouterr().out
    options = ["--output", prefix, "--tokenizer", model, "--valid_fraction=0.2", "--workers=1"]
    assert main(["tokenize", str(corpus), *options]) == 0
    assert "0 skipped, 0 empty" in capsys.readouterr().out
    parts = [f"{prefix}_train", f"{prefix}_valid"]
    assert main(["verify", *parts, "--tokenizer", model]) == 0
    assert capsys.readouterr().out.count("(vocabulary 500), checksums equal: good") == 2
    assert main(["merge", *parts, "--output", prefix]) == 0
    assert IndexedDataset(prefix).documents == len(texts)
    capsys.readouterr()
    assert main(["inspect", parts[0], "--tokenizer", model]) == 0
    shown = capsys.readouterr().out
    assert "uint16" in shown
    assert "50th percentile" in shown
    assert texts[0].splitlines()[0] in shown


def test_skipped_documents_are_reported(tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\nbad\n{"text": ""}\n')
    options = ["--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer_path), "--on_error=skip", "--workers=1"]
    main(["tokenize", str(tmp_path / "a.jsonl"), *options])
    captured = capsys.readouterr()
    assert "1 skipped, 1 empty" in captured.out
    assert "a.jsonl:2: malformed JSON" in captured.err


@pytest.mark.parametrize("command", ["train-tokenizer", "tokenize", "verify", "inspect", "merge"])
def test_help_describes_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    _, *options = capsys.readouterr().out.split("\n  --")
    assert options
    for option in options:
        description = re.sub(r"\(type.*|\(required.*", "", option, flags=re.DOTALL).split(maxsplit=2)[2:]
        assert len(" ".join(description).split()) >= 3, option


@pytest.fixture
def copy(token_file: str, tmp_path: Path) -> Path:
    """A copy of the corpus' token files that may be damaged."""
    for suffix in ("bin", "idx", "json"):
        shutil.copy(f"{token_file}.{suffix}", tmp_path / f"c.{suffix}")
    return tmp_path / "c"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("bit in bin", lambda p: flip(p.with_suffix(".bin"), 1000), r"c\.bin: its SHA-256 is not"),
    ("bit in header", lambda p: flip(p.with_suffix(".idx"), 3), r"c\.idx: starts with"),
    ("bit in lengths", lambda p: flip(p.with_suffix(".idx"), 40), r"c\.idx: sequence pointers"),
    ("bin cut", lambda p: p.with_suffix(".bin").write_bytes(p.with_suffix(".bin").read_bytes()[:-2]), r"c\.bin: \d+ bytes, but"),
    ("sidecar cut", lambda p: p.with_suffix(".json").write_text("{"), r"c\.json: not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "message"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_verify_finds_damage(copy: Path, fault: Callable[[Path], object], message: str) -> None:
    main(["verify", str(copy)])
    fault(copy)
    with pytest.raises(ValueError, match=message):
        main(["verify", str(copy)])


def test_verify_finds_ids_beyond_the_vocabulary(copy: Path, tokenizer_path: Path) -> None:
    copy.with_suffix(".json").unlink()
    main(["verify", str(copy), "--tokenizer", str(tokenizer_path)])
    data = copy.with_suffix(".bin").read_bytes()
    copy.with_suffix(".bin").write_bytes(struct.pack("<H", 700) + data[2:])
    main(["verify", str(copy)])  # without sidecar and tokenizer there is nothing to hold it against
    with pytest.raises(ValueError, match=r"c\.bin: token id 700 lies outside \[0, vocab_size=700\)"):
        main(["verify", str(copy), "--tokenizer", str(tokenizer_path)])


def test_merge_keeps_existing_files(copy: Path, token_file: str) -> None:
    before = copy.with_suffix(".bin").read_bytes()
    with pytest.raises(ValueError, match=r"output: .*c\.bin exists"):
        main(["merge", token_file, "--output", str(copy)])
    assert copy.with_suffix(".bin").read_bytes() == before
    main(["merge", token_file, token_file, "--output", str(copy), "--overwrite=true"])
    assert copy.with_suffix(".bin").read_bytes() == 2 * before


def test_merge_replaces_the_pair_it_made_itself(copy: Path, token_file: str, tmp_path: Path) -> None:
    """Two parts that are one file are no reason to refuse, nor is a part that the output only shares its folder with."""
    main(["merge", token_file, str(copy), "--output", str(tmp_path / "m")])
    main(["merge", token_file, str(copy), "--output", str(tmp_path / "m"), "--overwrite=true"])
    assert IndexedDataset(tmp_path / "m").documents == 2 * IndexedDataset(copy).documents


def test_names_with_markup_and_line_ends_are_shown(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    strange = copy.with_name("[") / "red]\nx"
    strange.parent.mkdir()
    for suffix in ("bin", "idx", "json"):
        shutil.copy(f"{copy}.{suffix}", f"{strange}.{suffix}")
    assert main(["inspect", str(strange)]) == 0
    assert main(["verify", str(strange)]) == 0
    assert capsys.readouterr().out.count("[/red]\\nx") == 2


def test_an_error_is_one_line_and_exit_code_2(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text"}\n')
    command = [sys.executable, "-m", "megagrin.cli", "data", "tokenize", str(tmp_path / "a.jsonl"), "--workers=2"]
    command += ["--output", str(tmp_path / "out"), "--tokenizer", str(tokenizer_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith(f"megagrin: error: {tmp_path / 'a.jsonl'}:2: malformed JSON")
    assert len(run.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_workers_start_without_torch() -> None:
    """Each worker process imports this module; torch would add seconds and hundreds of MB to every one of them."""
    code = "import sys, megagrin.data_prep.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
