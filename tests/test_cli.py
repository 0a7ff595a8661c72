"""What the `megagrin` command says, and how its process ends."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megagrin import cli

# `last` is dropped when the interpreter clears its modules: its message says that Python was finalized.
PROGRAM = """
import atexit, sys
from megagrin import cli
from megagrin.distributed.runtime import RuntimeConfig, session

class Last:
    def __del__(self):
        print("finalized", file=sys.stderr)

last = Last()
atexit.register(print, "handler ran")

def main():
    if sys.argv[1] == "rank":
        with session(RuntimeConfig(device="cpu")):
            pass
    print("unflushed")
    return 3

cli.main = main
cli.entry()
"""


@pytest.mark.parametrize(("process", "stderr"), [("rank", ""), ("other", "finalized\n")])
def test_a_rank_ends_without_finalizing_python(process: str, stderr: str) -> None:
    """Output, exit handlers and status arrive, and no thread of a process group can meet a finalizing interpreter."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, process], capture_output=True, text=True, timeout=120)
    assert done.stdout == "unflushed\nhandler ran\n"
    assert done.stderr == stderr
    assert done.returncode == 3


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_lost_output_is_an_error() -> None:
    """A full disk behind standard output: one line and a status that says so."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "megagrin.cli", "help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.stderr == "megagrin: error: standard output: [Errno 28] No space left on device\n"
    assert done.returncode == 2


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for argv in (["-h"], ["--help"], ["help"]):
        assert cli.main(argv) == 0
        assert capsys.readouterr().out == cli.usage() + "\n"
    assert cli.main([]) == 2
    out = capsys.readouterr().out
    assert out.startswith("usage: megagrin <command> [options]\n")
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["megagrin", "nothing"])
    assert cli.main() == 2
    assert capsys.readouterr().err.startswith("megagrin: error: nothing: no such command\n")


@pytest.mark.parametrize("command", ["generate", "export-hf", "import-hf", "plot"])
def test_help_describes_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Under the command's own name; the data commands' are in tests/data_prep/test_data_commands.py."""
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: megagrin {command} ")
    _, *options = re.split(r"\n  --", out)
    assert options
    for option in options:
        words = re.sub(r"\(type.*|\(required.*|\(default.*", "", option, flags=re.DOTALL).split(maxsplit=2)[2:]
        assert len(" ".join(words).split()) >= 2, option


def test_a_rank_is_named_only_among_several(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that carries its rank: said with it in a job, without it in a process alone; others are said by rank 0."""

    notes: list[str] = []

    def fails(_: list[str]) -> int:
        error = ValueError("x.y: 3 must be even")
        for note in notes:
            error.add_note(note)
        raise error

    monkeypatch.setattr(cli, "COMMANDS", {"fail": ("somewhere", "fails", "")})
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(fails=fails))
    for environment, noted, expected in (
        ({}, True, "megagrin: error: x.y: 3 must be even\n"),
        ({"WORLD_SIZE": "4", "RANK": "3"}, True, "megagrin: error: rank 3: x.y: 3 must be even\n"),
        ({"WORLD_SIZE": "4", "RANK": "3"}, False, ""),
        ({"WORLD_SIZE": "4", "RANK": "0"}, False, "megagrin: error: x.y: 3 must be even\n"),
    ):
        notes[:] = ["rank 3"] if noted else []
        for name in ("WORLD_SIZE", "RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert cli.main(["fail"]) == 2
        assert capsys.readouterr() == ("", expected)


def test_an_answer_does_not_load_torchs_compiler_of_extensions() -> None:
    """With a CUDA toolkit and no GPU, as on a login node, loading it logs a warning in front of the one line."""
    program = "import sys; from megagrin.cli import main; main(['train']); print('torch.utils.cpp_extension' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n"
    assert done.stderr.startswith("megagrin: error: data.train")
