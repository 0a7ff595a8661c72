"""The results file of `make gpu`, made from what its stages have written so far: <date>-<gpu>.md, ready for benchmarks/results/.

    python benchmarks/gpu_results.py FOLDER

Imports nothing beyond the standard library: it is called between stages, whatever has become of them.
"""

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

from gpu_goals import Outcome, above_the_limit, memory, outcomes
from gpu_predictions import SOURCE
from gpu_probe import read
from gpu_stages import first, second
from gpu_tables import around_lines, layer_lines, number, profile_lines, quickstart_lines, step_lines

_NAME = "stages/results.txt"  # holds the file's name: other files of the folder are not ours
_OWN_FILES: tuple[str, ...] = (_NAME, "log.txt", "summary.txt", "ops.json", "junit.xml", "stages/*.json", "quickstart.json")
_OWN_FILES += tuple(f"{folder}{name}" for folder in ("", "tuned/", "long/") for name in ("moe_layer.*", "model_*"))


def check_folder(out: Path) -> None:
    """A run removes what an earlier one left; nothing of anybody else's may lie there under one of the names.

    Raises:
        ValueError: the folder has files, and no run has been there.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / "stages").is_dir():
        raise ValueError(f"OUT: {out} holds files, and none of an earlier run; name a new or an empty folder")


def forget(out: Path) -> None:
    """Remove what an earlier run left in its folder; tables of tuned blocks stay."""
    _forget_file(out)
    for pattern in _OWN_FILES:
        for path in out.glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink()


def _names() -> list[tuple[str, str]]:
    """(half, stage), each stage once."""
    listed = [(half, stage.name) for half, stages in (("first", first), ("second", second)) for stage in stages(Path(), True)]
    return [(half, name) for index, (half, name) in enumerate(listed) if name not in [n for _, n in listed[:index]]]


def _stages(out: Path) -> dict[str, Any]:
    return {name: read(out / "stages" / f"{name}.json") for _, name in _names()}


def path(out: Path) -> Path:
    """Where the file lies: by the day on which the run began and the GPU's name."""
    dates = [record["date"] for record in _stages(out).values() if record]
    environment = read(out / "environment.json") or {}
    gpu = re.sub(r"[^a-z0-9]+", "-", environment.get("gpu", "unknown gpu").lower().removeprefix("nvidia ")).strip("-")
    return out / f"{min(dates, default='undated')}-{gpu}.md"


def _head(out: Path, stages: dict[str, Any], found: list[Outcome], dry: bool) -> list[str]:
    environment = read(out / "environment.json") or {}
    count = {verdict: sum(outcome.verdict == verdict for outcome in found) for verdict in ("met", "missed", "unmeasured")}
    title = (
        "A dry run of `make gpu`: it measured nothing"
        if dry
        else f"`make gpu` on {environment.get('device', 'an unknown device')}"
    )
    versions = ", ".join(f"{name} {environment[name]}" for name in ("python", "torch", "triton", "numpy") if name in environment)
    commands = dict.fromkeys(record["run"] for record in stages.values() if record)
    probed = read(out / "ops.json")
    kernels = (
        "not probed" if probed is None else "all on" if probed["kernels"] == "auto" else f"`MEGAGRIN_KERNELS={probed['kernels']}`"
    )
    driver = f", driver {environment['driver']}" if "driver" in environment else ""
    rates = read(out / "moe_layer.json") or read(out / "tuned" / "moe_layer.json") or {}
    speed = ""
    if rates and not dry:
        speed = f"; {rates['dense_square_tflops']:.0f} TFLOP/s in a dense 8192³ bf16 product"
        speed += f", {rates['copy_terabytes_per_second']:.2f} TB/s in a copy"
    return [
        f"# {title}",
        "",
        f"- **Hardware:** {environment.get('device', 'unknown')}{driver}{speed}. {versions}.",
        f"- **Command:** {', '.join(f'`{command}`' for command in commands)}",
        f"- **Code:** commit {environment.get('commit', 'unknown')}, kernels {environment.get('kernels', 'unknown')}",
        f"- **Prediction:** {SOURCE}.",
        f"- **Outcome:** of {len(found)} goals {count['met']} met, {count['missed']} missed, {count['unmeasured']} unmeasured.",
        f"- **Kernels:** {kernels}.",
        "",
    ]


def _stage_lines(out: Path, stages: dict[str, Any]) -> list[str]:
    lines = [
        "## Stages",
        "",
        "| half | stage | limit, s | took, s | | peak, GiB allocated / reserved |",
        "|---|---|---|---|---|---|",
    ]
    peaks = memory(out)
    for half, name in _names():
        record = stages[name]
        if record is None:
            lines.append(f"| {half} | {name} | | | not run | |")
            continue
        peak = f"{peaks[name]['allocated']:.1f} / {peaks[name]['reserved']:.1f}" if name in peaks else "–"
        lines.append(f"| {record['half']} | {name} | {record['limit_s']} | {record['seconds']:.0f} | {record['word']} | {peak} |")
    return [*lines, ""]


def _goal_lines(found: list[Outcome]) -> list[str]:
    lines = [
        "## Goals",
        "",
        "On learned-like routing; D is dense cuBLAS at the same FLOPs. Verdicts are on tuned blocks where those were measured.",
        "",
    ]
    lines += ["| goal | wanted | predicted | blocks that were there | tuned | |", "|---|---|---|---|---|---|"]
    for outcome in found:
        goal = outcome.goal
        shown = [number(value, goal.is_share) for value in (goal.wanted, outcome.plain, outcome.tuned)]
        sign = "≤ " if goal.at_most else "≥ "
        lines.append(f"| {goal.text} | {sign}{shown[0]} | {goal.predicted} | {shown[1]} | {shown[2]} | {outcome.verdict} |")
    return [*lines, ""]


def _failures(out: Path, stages: dict[str, Any], found: list[Outcome]) -> list[str]:
    probed = read(out / "ops.json") or {"ops": {}}
    failed = [f"stage {name}: {record['word']}" for name, record in stages.items() if record and record["word"] != "ok"]
    failed += [
        f"kernel {op}: {result['state']} ({result['message']}): the stages after it ran without it"
        for op, result in probed["ops"].items()
        if result["state"] != "ok"
    ]
    failed += [f"memory, {line}" for line in above_the_limit(out)]
    left = [f"stage {name}: not run" for name, record in stages.items() if record is None]
    left += [outcome.goal.text for outcome in found if outcome.verdict == "unmeasured"]
    for folder in (out, out / "tuned"):
        left += [
            f"layer{' (tuned)' * (folder != out)}, {line}" for line in (read(folder / "moe_layer.json") or {}).get("left_out", [])
        ]
    sections = (("What failed", failed), ("Not measured", left))
    return [
        line for title, lines in sections for line in (f"## {title}", "", *([f"- {text}" for text in lines] or ["Nothing."]), "")
    ]


def text(out: Path) -> str:
    """The whole file."""
    stages = _stages(out)
    dry = any(record["dry"] for record in stages.values() if record)
    found = outcomes(out, measured=not dry)
    lines = [*_head(out, stages, found, dry), *_stage_lines(out, stages), *_goal_lines(found)]
    if not dry:
        for folder, blocks in ((out, "blocks that were there"), (out / "tuned", "tuned blocks")):
            lines += layer_lines(read(folder / "moe_layer.json"), blocks) + around_lines(read(folder / "moe_layer.json"))
        steps = [("blocks that were there", out), ("tuned", out / "tuned"), ("one long sequence", out / "long")]
        lines += step_lines([(name, read(folder / "model_step.json")) for name, folder in steps])
        lines += quickstart_lines(read(out / "quickstart.json"))
        lines += profile_lines(read(out / "tuned" / "model_step.json"))
    return "\n".join([*lines, *_failures(out, stages, found)]).rstrip() + "\n"


def _forget_file(out: Path) -> None:
    with contextlib.suppress(OSError):
        (out / (out / _NAME).read_text().strip()).unlink()


def write(out: Path) -> None:
    """Write it, in place of the one before, whose name may have been another."""
    target, content = path(out), text(out)
    _forget_file(out)
    with contextlib.suppress(OSError):
        (out / _NAME).parent.mkdir(exist_ok=True)
        (out / _NAME).write_text(f"{target.name}\n")
    partial = target.with_suffix(".partial")
    partial.write_text(content)
    partial.replace(target)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    print(path(Path(sys.argv[1])))
