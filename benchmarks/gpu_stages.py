"""The stages of `make gpu`: what is run, in which half, and for how long at most.

Limits are for the worst case, in which every stage hangs: a half with its start and its kills fits one command (300 and 360 s).
Programs that can end by themselves with what they have get a budget (`--seconds`) that lies under the limit of their stage.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

# From the end of its limit to the end of its process.
KILL_S = 3
# launch/gpu.sh's own look at the GPU: one import of torch.
START_S = 8
# A dry run is no measurement: its limits only end what hangs, on a machine that may be busy.
DRY_S = 300
MOST_S = {"first": 300, "second": 360}
BENCHMARKS = "benchmarks"
CONTESTANTS = ("megagrin", "torch._grouped_mm", "cuBLAS loop")
SHAPES = ("32768x4096x6400x16x2", "8192x4096x6400x16x2", "32768x2048x768x128x8", "32768x4096x2048x64x4")


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: unique; of its files, too.
        limit_s: seconds until it is killed.
        command: from the root of the checkout.
        needs: a package without which it is not run.
        expected: the exit status of success.
        variables: environment variables on top.
    """

    name: str
    limit_s: int
    command: list[str]
    needs: str | None = None
    expected: int = 0
    variables: dict[str, str] = field(default_factory=dict)


def _capped(out: Path, name: str, *command: str) -> list[str]:
    """A program under the memory limit, whose peaks go beside the stage's own file."""
    return [sys.executable, f"{BENCHMARKS}/capped.py", str(out / "stages" / f"{name}.memory.json"), *command]


def _repeated(option: str, values: tuple[str, ...]) -> list[str]:
    return [word for value in values for word in (option, value)]


def _shared(out: Path, dry: bool) -> list[Stage]:
    """Both halves begin with these."""
    python, smoke = sys.executable, ["--smoke"] if dry else []
    environment = [python, f"{BENCHMARKS}/gpu_environment.py", "--out", str(out), *(["--dry"] if dry else [])]
    probe = [python, f"{BENCHMARKS}/gpu_probe.py", "--out", str(out), "--limit", str(DRY_S - 10) if dry else "46", *smoke]
    return [Stage("environment", DRY_S if dry else 12, environment), Stage("ops", DRY_S if dry else 50, probe)]


def _layer(out: Path, name: str, folder: Path, dry: bool, contestants: tuple[str, ...] = ()) -> list[str]:
    how = ["--smoke", "--rounds", "1", "--pause", "0"] if dry else ["--seconds", "48"]
    program = [f"{BENCHMARKS}/moe_layer.py", *how, "--out", str(folder), *_repeated("--contestant", contestants)]
    return _capped(out, name, *program)


def _step(out: Path, name: str, folder: Path, dry: bool, seconds: int, *more: str) -> list[str]:
    how = ["--smoke"] if dry else ["--seconds", str(seconds)]
    return _capped(out, name, f"{BENCHMARKS}/model_step.py", *how, *more, "--out", str(folder))


def first(out: Path, dry: bool) -> list[Stage]:
    """Is it right, and how fast with the blocks that are there; after it every goal has a number."""
    tests = [sys.executable, "tests/gpu/run.py", "--limit", str(DRY_S - 10) if dry else "52", "--shards", "1" if dry else "4"]
    tests += ["--junit", str(out / "junit.xml"), "--peaks", str(out / "stages" / "tests.memory.json")]
    quickstart = [f"{BENCHMARKS}/quickstart_model.py", *(["--device", "cpu", "--steps", "4"] if dry else ["--seconds", "14"])]
    return [
        *_shared(out, dry),
        Stage("tests", DRY_S if dry else 55, tests, needs="pytest"),
        Stage("layer", DRY_S if dry else 70, _layer(out, "layer", out, dry, CONTESTANTS)),
        Stage("step", DRY_S if dry else 57, _step(out, "step", out, dry, 42, "--micro_batches", "4")),
        Stage("quickstart", DRY_S if dry else 30, _capped(out, "quickstart", *quickstart, "--out", str(out))),
    ]


def second(out: Path, dry: bool) -> list[Stage]:
    """Tuned blocks, the same measurements with them and the other peers, a profile, a long sequence, the sanitizer."""
    tuned, long = out / "tuned", out / "long"
    table = {"MEGAGRIN_TUNED": str(out)}
    tune = ["-m", "megagrin.cli", "kernels", "tune", *_repeated("--shape", SHAPES), "--seconds", "45", "--out", str(out)]
    # Without the root's conftest.py, which needs more packages.
    sanitizer = ["-m", "pytest", "-m", "gpu", "--confcutdir=tests/gpu", "-p", "no:cacheprovider", "-rs", "tests/gpu/sanitizer"]
    profile = _step(out, "profile", tuned, dry, 30, "--micro_batches", "4", "--profile")
    one_sequence = ("--seq_len", "32768", "--sequences", "1", "--steps", "3")
    return [
        *_shared(out, dry),
        # Without a GPU it refuses, in one line.
        Stage("tune", DRY_S if dry else 62, _capped(out, "tune", *tune), expected=2 if dry else 0),
        Stage("tuned", DRY_S if dry else 70, _layer(out, "tuned", tuned, dry), variables=table),
        Stage("profile", DRY_S if dry else 50, profile, variables=table),
        Stage("long", DRY_S if dry else 43, _step(out, "long", long, dry, 25, *one_sequence), variables=table),
        Stage("sanitizer", DRY_S if dry else 44, [sys.executable, *sanitizer], needs="pytest"),
    ]
