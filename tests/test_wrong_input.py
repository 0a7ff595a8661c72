"""Wrong input to every command and setting: one line that names setting, value and rule, and everything stays as it was.

The tables are in wrong_values.py; those of `megagrin data` are in data_prep/.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from wrong_values import COMMANDS, RECIPES, TRAIN, Case, of_settings

from megagrin.cli import main
from megagrin.data_prep.indexed import IndexedDatasetWriter
from megagrin.data_prep.sidecar import Provenance
from megagrin.data_prep.tokenizer import Tokenizer

VOCAB = 97
TINY = [
    "--model.preset=grin_tiny",
    f"--model.vocab_size={VOCAB}",
    "--model.n_layers=2",
    "--model.d_model=32",
    "--model.head_dim=8",
    "--model.d_ff=16",
    "--train.steps=4",
    "--train.seq_len=32",
    "--train.global_batch_size=4",
    "--train.micro_batch_size=1",
    "--train.eval_samples=4",
    "--optim.warmup_steps=1",
    "--engine.dtype=fp32",
    "--model.n_experts=4",
    "--metrics.console=false",
    "--metrics.peak_tflops=1",
    "--runtime.device=cpu",
]
# Words of libraries and of Python, not of a user.
FOREIGN = (
    "Traceback",
    "functools",
    "<class",
    "INTERNAL",
    "site-packages",
    "object at 0x",
    "NoneType",
    "Parser key",
    "Expected a",
    "errno",
)
Refusal = Callable[[list[str], list[str]], None]


def _write_tokens(prefix: Path, tokenizer: str | None, seed: int, documents: int = 30) -> None:
    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, Provenance(vocab_size=VOCAB, tokenizer_sha256=tokenizer)) as writer:
        for length in generator.integers(5, 40, documents):
            writer.add(np.cumsum(generator.integers(0, 3, length)) % VOCAB)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> dict[str, str]:
    """What the tables' {names} stand for; `root` holds all of it, and the working folder."""
    root = tmp_path_factory.mktemp("wrong")
    for name, tokenizer, seed, documents in (
        ("tokens", small_tokenizer.sha256, 0, 30),
        ("second_tokens", small_tokenizer.sha256, 1, 30),
        ("other_tokens", "b" * 64, 0, 30),
        ("empty_tokens", small_tokenizer.sha256, 0, 0),
        ("cut_tokens", small_tokenizer.sha256, 2, 30),
    ):
        _write_tokens(root / name, tokenizer, seed, documents)
    with (root / "cut_tokens.bin").open("r+b") as file:
        file.truncate(100)
    assert main(["train", *TINY, f"--train.run_dir={root / 'run'}", f"--data.train={root / 'tokens'}"]) == 0
    for name in ("damaged_run", "cut_run", "damaged_metrics"):
        shutil.copytree(root / "run", root / name)
    (checkpoint,) = (root / "damaged_run" / "checkpoints").iterdir()
    (checkpoint / "checkpoint.json").write_text("{")
    (checkpoint,) = (root / "cut_run" / "checkpoints").iterdir()
    for file_ in checkpoint.glob("*.safetensors"):
        file_.write_bytes(file_.read_bytes()[:1000])
    (root / "damaged_metrics" / "metrics.jsonl").write_text("no row\n" + (root / "run" / "metrics.jsonl").read_text())
    (root / "folder" / "inside").mkdir(parents=True)
    (root / "text").write_text("some text\n")
    (root / "binary").write_bytes(bytes(range(256)))
    (root / "tokenizer").write_bytes(Path(small_tokenizer.path).read_bytes())
    for name, content in (("broken_hf", "{"), ("empty_hf", "{}")):
        (root / name).mkdir()
        (root / name / "config.json").write_text(content)
    (root / "cwd").mkdir()
    names = [path.name for path in root.iterdir()] + [f.name.removesuffix(".bin") for f in root.glob("*.bin")]
    return {name: str(root / name) for name in [*names, "missing", "new"]} | {"root": str(root)}


def _filled(text: str, paths: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda name: paths.get(name[1], name[0]), text)


def _contents(root: str) -> dict[str, str]:
    """Every file below a folder with a digest of its bytes; folders with none."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(Path(root).rglob("*"))
    }


@pytest.fixture
def refuses(paths: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """Runs a command that must be refused as every command is to be."""
    monkeypatch.chdir(Path(paths["root"]) / "cwd")

    def refuse(argv: list[str], named: list[str]) -> None:
        argv, named = ([_filled(text, paths) for text in texts] for texts in (argv, named))
        before = _contents(paths["root"])
        capsys.readouterr()
        try:
            status = main(argv)
        except SystemExit as stop:
            status = stop.code  # type: ignore[assignment]
        captured = capsys.readouterr()
        first, *rest = captured.err.splitlines() or [""]
        answer = captured.err
        assert status == 2, f"status {status}: {answer}{captured.out}"
        assert first.startswith("megagrin: error: "), answer
        assert not rest or (
            first.endswith(f"{len(rest)} settings do not fit:") and all(line.startswith("  ") for line in rest)
        ), answer
        for part in named:
            assert part in answer, f"{part!r} is not named: {answer}"
        for word in FOREIGN:
            assert word not in answer, answer
        assert _contents(paths["root"]) == before, answer

    return refuse


@pytest.fixture
def train(paths: dict[str, str], refuses: Refusal) -> Refusal:
    """`refuses` for settings of a run that is right but for them: asked about, and started."""

    def refuse(settings: list[str], named: list[str]) -> None:
        run = ["train", *TINY, "--train.run_dir=new_run", f"--data.train={paths['tokens']}", *settings]
        refuses([*run, "--dry_run"], named)
        refuses(run, named)

    return refuse


def test_what_is_right_is_accepted(paths: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without wrong input the run of these tests is not refused, new or resumed or from other weights."""
    monkeypatch.chdir(tmp_path)
    run = ["train", *TINY, f"--data.train={paths['tokens']}", "--dry_run"]
    assert main(run) == 0
    assert main([*run, f"--train.run_dir={paths['run']}"]) == 0
    assert main([*run, f"--train.init_from={paths['run']}"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_there_are_enough() -> None:
    """Three hundred and eighty here; `megagrin data` has its own."""
    cases = [*of_settings(), *RECIPES, *TRAIN, *COMMANDS]
    assert len({json.dumps(case) for case in cases}) == len(cases) >= 380


@pytest.mark.parametrize("case", of_settings(), ids=lambda case: case[0][0])
def test_settings(train: Refusal, case: Case) -> None:
    """Values of another type, or beyond a setting's bounds."""
    setting, _, value = case[0][0].partition("=")
    # What is no number is shown as it was given; infinities as Python writes them.
    train(case[0], [setting.removeprefix("--"), "''" if value == "" else value.replace(".inf", "inf")])


@pytest.mark.parametrize(("text", "named"), RECIPES, ids=lambda value: repr(value)[:30])
def test_recipes(paths: dict[str, str], refuses: Refusal, text: str, named: list[str]) -> None:
    """Files that are no recipe, or hold what a recipe may not say."""
    recipe = Path(paths["root"]) / "cwd" / "recipe.yaml"
    recipe.write_text(text)
    for dry in ([], ["--dry_run"]):
        refuses(["train", "--config", "recipe.yaml", *dry], named)


@pytest.mark.parametrize("case", TRAIN, ids=lambda case: " ".join(case[0]))
def test_train(train: Refusal, case: Case) -> None:
    """Files, folders, devices, and settings that do not go together."""
    train(*case)


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: " ".join(case[0]))
def test_commands(refuses: Refusal, case: Case) -> None:
    """The other commands."""
    refuses(*case)
