"""The parts of `make gpu` that look after its stages: what hangs is ended, what fails is named, what was measured is reported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import device_memory
import gpu_goals
import gpu_predictions
import gpu_probe
import gpu_results
import gpu_run
import moe_shapes
import pytest
import quickstart_model
import recipe
import torch
import yaml
from gpu_stages import Stage

from megagrin.kernels import backend

ROOT = Path(__file__).resolve().parents[2]
# One op raises, one is ended by a signal, one hangs; the others are well.
PLANTED = """
import os, signal, sys, time
op = sys.argv[1]
print(f"{op}: small shape", flush=True)
if op == "sparsemixer":
    raise RuntimeError("an illegal memory access was encountered")
if op == "permute":
    os.kill(os.getpid(), signal.SIGKILL)
if op == "cross_entropy":
    time.sleep(600)
"""


def test_ops_that_fail_die_or_hang_are_switched_off(tmp_path: Path) -> None:
    program = tmp_path / "planted.py"
    program.write_text(PLANTED)
    (tmp_path / "environment.json").write_text('{"gpu": "this one"}')
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_probe.py"), "--out", str(tmp_path), "--limit", "6"]
    done = subprocess.run([*command, "--program", str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    record = json.loads((tmp_path / "ops.json").read_text())
    states = {op: result["state"] for op, result in record["ops"].items()}
    assert states == {
        **dict.fromkeys(gpu_probe.OPS, "ok"),
        "sparsemixer": "failed with status 1",
        "permute": "ended by SIGKILL",
        "cross_entropy": "hung",
    }
    assert record["ops"]["sparsemixer"]["message"] == "RuntimeError: an illegal memory access was encountered"
    assert record["ops"]["cross_entropy"]["message"] == "cross_entropy: small shape"
    off = record["kernels"].split(",")
    assert off[0] == "auto"
    assert set(off[1:]) == {"-sparsemixer", "-permute", "-cross_entropy"}
    assert backend._switched_off(record["kernels"]) == {"sparsemixer", "permute", "cross_entropy", "moe_mlp"}
    # The same environment: not again, unless one hung. Another one: again.
    none = [*command, "--program", str(tmp_path / "none.py")]
    record["ops"]["cross_entropy"]["state"] = "failed with status 1"
    (tmp_path / "ops.json").write_text(json.dumps(record))
    again = subprocess.run(none, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1
    assert f"MEGAGRIN_KERNELS={record['kernels']}" in again.stdout
    record["ops"]["cross_entropy"]["state"] = "hung"
    (tmp_path / "ops.json").write_text(json.dumps(record))
    assert "can't open file" in subprocess.run(none, capture_output=True, text=True, timeout=60).stdout
    (tmp_path / "environment.json").write_text('{"gpu": "another one"}')
    program.write_text("")
    assert subprocess.run([*command, "--program", str(program)], capture_output=True, timeout=60).returncode == 0
    assert json.loads((tmp_path / "ops.json").read_text())["kernels"] == "auto"


def test_names_of_ops_are_those_of_the_kernels() -> None:
    """The probe and the runner know them without importing torch."""
    import gpu_op

    assert set(gpu_probe.OPS) == set(backend.OPS) == set(gpu_op.CASES)


@pytest.mark.parametrize(
    ("own", "probed", "together"),
    [
        ("auto", "auto", "auto"),
        ("auto", "auto,-permute", "auto,-permute"),
        ("auto,-sparsemixer", "auto,-permute", "auto,-sparsemixer,-permute"),
        ("torch", "auto,-permute", "torch"),
    ],
)
def test_what_the_user_switched_off_stays_off(own: str, probed: str, together: str) -> None:
    assert gpu_run.both(own, probed) == together
    backend._switched_off(together)


@pytest.mark.parametrize("value", ["", "triton", "auto,-all", "auto,", "torch,-permute"])
def test_the_runner_refuses_what_the_kernels_refuse(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MEGAGRIN_KERNELS", value)
    with pytest.raises(ValueError, match="MEGAGRIN_KERNELS") as runner:
        gpu_run.kernels()
    with pytest.raises(ValueError, match="MEGAGRIN_KERNELS") as kernels:
        backend.use_triton(torch.zeros(1), "permute")
    assert str(runner.value) == str(kernels.value)


@pytest.mark.parametrize(
    ("code", "expected", "word"),
    [
        ("print('said')", 0, "ok"),
        ("raise SystemExit(2)", 2, "ok"),
        ("raise SystemExit(3)", 0, "FAILED: status 3"),
        ("import os; os.kill(os.getpid(), 11)", 0, "FAILED: ended by SIGSEGV"),
    ],
)
def test_how_a_stage_ends_is_said(tmp_path: Path, code: str, expected: int, word: str) -> None:
    stage = Stage("one", 60, [sys.executable, "-c", code], expected=expected)
    assert gpu_run.run_stage(stage, tmp_path / "log.txt", {}) == word
    assert "said" not in code or (tmp_path / "log.txt").read_text() == "said\n"


def test_goals_are_those_of_the_benchmark() -> None:
    """Wanted figures stand in two places, one of which must not import torch."""
    predicted = {(goal.where, goal.quantity): goal.wanted for goal in gpu_predictions.GOALS}
    for shape in moe_shapes.SHAPES:
        assert shape.goal is not None
        names = ("forward_tflops", "backward_tflops") if shape.goal.absolute else ("forward_of_dense", "total_of_dense")
        assert [predicted[shape.name, name] for name in names] == [shape.goal.forward, shape.goal.second]
        assert predicted[shape.name, "overhead_share"] == 0.05


def _case(name: str, routing: str, forward: float, total: float) -> dict[str, Any]:
    rates = {"forward_tflops": 600.0, "backward_tflops": 500.0, "total_tflops": 550.0, "error": None}
    ours = {**rates, "forward_of_dense": forward, "total_of_dense": total}
    return {
        "shape": {"name": name},
        "routing": routing,
        "dense_tflops": {"forward": 700.0, "total": 710.0},
        "contestants": {"megagrin": ours, "cuBLAS loop": {"error": "absent | or worse"}},
        "overhead_s": {"router": 1e-3, "combine": 2e-4},
        "overhead_share": 0.04,
        "kernels": [{"kernel": "up", "seconds": {"megagrin": 1.0, "torch._grouped_mm": 1.25}}],
    }


def measured(out: Path) -> None:
    """What some stages of a run leave, with invented figures."""
    for folder in ("stages", "tuned", "long"):
        (out / folder).mkdir(exist_ok=True)

    def put(name: str, record: object) -> None:
        (out / name).write_text(json.dumps(record))

    put(
        "environment.json",
        {"gpu": "NVIDIA H100 80GB HBM3", "device": "an H100", "torch": "2.11", "commit": "abc", "kernels": "d"},
    )
    put("ops.json", {"kernels": "auto,-permute", "ops": {"permute": {"state": "hung", "message": "permute: grin shape"}}})
    stage = {"half": "first", "limit_s": 50, "seconds": 40.0, "date": "2026-12-24", "dry": False, "run": "make gpu HALF=first"}
    for name, word in (
        ("environment", "ok"),
        ("ops", "FAILED: status 1"),
        ("layer", "ok"),
        ("step", "FAILED: the run ended in it"),
    ):
        put(f"stages/{name}.json", {**stage, "name": name, "word": word})
    put("stages/layer.memory.json", {"allocated": 50.0, "reserved": 60.5})
    put("stages/step.memory.json", {"allocated": 69.0, "reserved": 71.5})
    layer = {"dense_square_tflops": 751.0, "copy_terabytes_per_second": 2.9, "left_out": ["wide-32k, balanced: out of time"]}
    put("moe_layer.json", {**layer, "cases": [_case("grin-32k", "learned", 0.9, 0.8), _case("grin-32k", "balanced", 0.1, 0.1)]})
    put("tuned/moe_layer.json", {**layer, "cases": [_case("grin-32k", "learned", 0.87, 0.88)]})
    result = {"step_ms": 300.0, "tokens_per_second": 1e5, "mfu": 0.4, "peak_gib": 60.0, "largest_load": 0.1, "loss": 8.0}
    results = [{**result, "routing": "learned", "tflops": 490.0}, {**result, "routing": "forced balance", "tflops": 500.0}]
    put("model_step.json", {"model": {"n_layers": 2}, "tokens": 32768, "results": results})


def row(text: str, start: str) -> str:
    """The one line that begins so."""
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return line


def test_results_put_outcomes_beside_predictions(tmp_path: Path) -> None:
    measured(tmp_path)
    gpu_results.write(tmp_path)
    text = (tmp_path / "2026-12-24-h100-80gb-hbm3.md").read_text()
    assert text.startswith("# `make gpu` on an H100\n")
    # The verdict is that of tuned blocks, where they were measured; balanced routing does not count.
    assert row(text, "| grin-32k: forward, of D") == "| grin-32k: forward, of D | ≥ 88.0 % | 80 % | 90.0 % | 87.0 % | missed |"
    assert row(text, "| grin-32k: with backward").endswith("| 80.0 % | 88.0 % | met |")
    assert row(text, "| training step, 2").endswith("| ≥ 500 | 313 | 490 | – | missed |")
    assert row(text, "| learned routing slower").endswith("| ≤ 3.0 % | 1.0 % | 2.0 % | – | met |")
    assert row(text, "| grin-8k: forward, of D").endswith("| – | – | unmeasured |")
    assert row(text, "| largest memory peak").endswith("| 71.5 | – | missed |")
    assert row(text, "| first | step") == "| first | step | 50 | 40 | FAILED: the run ended in it | 69.0 / 71.5 |"
    assert row(text, "| second | tuned") == "| second | tuned | | | not run | |"
    assert "absent / or worse" in row(text, "| grin-32k, balanced | 700 / 710")
    failed, _, left = text.partition("## What failed")[2].partition("## Not measured")
    assert "kernel permute: hung (permute: grin shape)" in failed
    assert "memory, step: 71.5 GiB reserved at its peak, allowed 70" in failed
    assert "stage tests: not run" in left
    assert "layer, wide-32k, balanced: out of time" in left
    assert "- grin-8k: forward, of D" in left


@pytest.mark.parametrize("broken", ["moe_layer.json", "ops.json", "stages/layer.json", "environment.json"])
def test_results_are_written_whatever_is_missing_or_cut(tmp_path: Path, broken: str) -> None:
    measured(tmp_path)
    for path in (tmp_path / broken,):
        path.write_text(path.read_text()[:20])
        gpu_results.write(tmp_path)
        path.unlink()
        gpu_results.write(tmp_path)
    assert list(tmp_path.glob("*.md"))


def test_results_of_nothing(tmp_path: Path) -> None:
    gpu_results.write(tmp_path)
    text = (tmp_path / "undated-unknown-gpu.md").read_text()
    assert f"of {len(gpu_predictions.GOALS)} goals 0 met, 0 missed, {len(gpu_predictions.GOALS)} unmeasured" in text
    measured(tmp_path)
    gpu_results.write(tmp_path)
    assert [path.name for path in tmp_path.glob("*.md")] == ["2026-12-24-h100-80gb-hbm3.md"]


def test_a_new_run_forgets_the_one_before(tmp_path: Path) -> None:
    measured(tmp_path)
    (tmp_path / "NVIDIA_H100_triton3.6.json").write_text("{}")
    gpu_results.write(tmp_path)
    gpu_results.forget(tmp_path)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"environment.json", "NVIDIA_H100_triton3.6.json"}


def test_a_dry_run_has_no_figures(tmp_path: Path) -> None:
    measured(tmp_path)
    assert any(outcome.verdict != "unmeasured" for outcome in gpu_goals.outcomes(tmp_path, measured=True))
    assert {outcome.verdict for outcome in gpu_goals.outcomes(tmp_path, measured=False)} == {"unmeasured"}


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_read_as_yaml_reads_them(path: Path) -> None:
    expected = yaml.safe_load(path.read_text())
    for section in expected.values():  # YAML 1.1 takes 1.2e-3 for a number, 1e-3 for a string: recipes have the former
        assert all(isinstance(value, str | int | float | bool) for value in section.values())
    assert recipe.read(path) == expected


@pytest.mark.parametrize("line", ["model: {a: 1}", "  name:", "   name: 1", "model", "  list: [1]", '  text: "quoted"', "  - 1"])
def test_what_is_not_a_plain_recipe_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model:\n  vocab_size: 8\n{line}\n")
    with pytest.raises(ValueError, match=r"recipe.yaml:3: .* must be `section:` or `  name: value`"):
        recipe.read(path)


def test_the_quickstart_s_model_is_the_recipe_s() -> None:
    settings = {name: dict(section) for name, section in recipe.read(quickstart_model.RECIPE).items()}
    model = quickstart_model.model_of(settings["model"])
    assert (model.preset, model.vocab_size, model.init_std, model.d_model) == ("grin_tiny", 1024, 0.04, 256)
    parts = quickstart_model.batches(torch.arange(5000), settings["train"], 3)
    assert [part.tokens_BS.shape for part in parts] == [(2, 256)] * 2
    for part in parts:
        assert torch.equal(part.labels_BS, part.tokens_BS + 1)
    text_N = quickstart_model.corpus()
    assert 0 <= int(text_N.min()) <= int(text_N.max()) < model.vocab_size


class FakeCuda:
    """torch.cuda's statistics of one device."""

    def __init__(self) -> None:
        self.allocated, self.reserved, self.fraction = 0, 0, 0.0

    def install(self, monkeypatch: pytest.MonkeyPatch, total_gib: int) -> None:
        replaced: dict[str, Any] = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: type("Properties", (), {"total_memory": total_gib << 30}),
            "set_per_process_memory_fraction": lambda fraction: setattr(self, "fraction", fraction),
            "max_memory_allocated": lambda: self.allocated,
            "max_memory_reserved": lambda: self.reserved,
            "reset_peak_memory_stats": lambda: self.__dict__.update(allocated=0, reserved=0),
        }
        for name, function in replaced.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(device_memory, "_highest", {"allocated": 0, "reserved": 0})


@pytest.mark.parametrize(("total_gib", "fraction"), [(140, 0.5), (40, 1.0)])
def test_memory_is_capped_and_peaks_outlive_resets(monkeypatch: pytest.MonkeyPatch, total_gib: int, fraction: float) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch, total_gib)
    device_memory.cap()
    assert cuda.fraction == fraction
    cuda.allocated, cuda.reserved = 5 << 30, 6 << 30
    device_memory.reset_peaks()
    cuda.allocated, cuda.reserved = 3 << 30, 7 << 30
    assert device_memory.peaks() == {"allocated": 5.0, "reserved": 7.0}


@pytest.mark.parametrize("ending", ["pass", "raise SystemExit(3)", "raise ValueError", "import os; os.kill(os.getpid(), 15)"])
def test_peaks_are_written_however_a_program_ends(tmp_path: Path, ending: str) -> None:
    program, peaks = tmp_path / "program.py", tmp_path / "peaks.json"
    program.write_text(f"import sys\nassert sys.argv[1:] == ['--an', 'option'] and __name__ == '__main__'\n{ending}\n")
    command = [sys.executable, str(ROOT / "benchmarks" / "capped.py"), str(peaks), str(program), "--an", "option"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == {"pass": 0, "raise SystemExit(3)": 3, "raise ValueError": 1}.get(ending, 128 + 15), done.stderr
    assert peaks.read_text() == "null\n"
