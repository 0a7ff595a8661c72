"""From measurements to a verdict per goal, a printed table and a dated markdown file."""

import platform
import subprocess
from typing import Any

import torch
from moe_published import published_lines
from moe_shapes import Goal, MoEShape

OURS = "megagrin"
OVER_GROUPED_MM_KERNEL, OVER_GROUPED_MM_LAYER, MAX_OVERHEAD_SHARE = 1.08, 1.6, 0.05


def environment() -> dict[str, str]:
    """Hardware and versions."""
    import numpy

    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "none"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = f"{properties.name}, {properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = _driver()
    else:
        found["device"] = f"CPU, {torch.get_num_threads()} threads"
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.draw", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def tflops(flops: float, seconds: float) -> float:
    """Rate in TFLOP/s."""
    return flops / seconds / 1e12


def rates(shape: MoEShape, seconds: dict[str, float], dense: dict[str, float]) -> dict[str, float | None]:
    """TFLOP/s and ratios of a contestant.

    Args:
        seconds: `forward`, and `total` (forward with backward) where it trains.
        dense: the same of the dense products.
    """
    found: dict[str, float | None] = {
        "forward_ms": seconds["forward"] * 1e3,
        "forward_tflops": tflops(shape.forward_flops, seconds["forward"]),
        "forward_of_dense": dense["forward"] / seconds["forward"],
        **dict.fromkeys(("total_ms", "total_tflops", "total_of_dense", "backward_tflops")),
    }
    if "total" in seconds:
        backward_s = seconds["total"] - seconds["forward"]
        found |= {
            "total_ms": seconds["total"] * 1e3,
            "total_tflops": tflops(shape.forward_flops + shape.backward_flops, seconds["total"]),
            "total_of_dense": dense["total"] / seconds["total"],
            # A noisy CPU can time the whole shorter than its part.
            "backward_tflops": tflops(shape.backward_flops, backward_s) if backward_s > 0 else None,
        }
    return found


def _verdict(value: float | None, wanted: float, measured_on: bool, at_most: bool = False) -> str:
    if value is None or not measured_on:
        return "unmeasured"
    return "met" if (value <= wanted if at_most else value >= wanted) else "missed"


def _shape_goals(name: str, goal: Goal, ours: dict[str, Any], counts: bool) -> list[dict[str, Any]]:
    if goal.absolute:
        pairs = [("forward, TFLOP/s", ours.get("forward_tflops"), goal.forward)]
        pairs.append(("backward, TFLOP/s", ours.get("backward_tflops"), goal.second))
    else:
        pairs = [("forward, share of dense", ours.get("forward_of_dense"), goal.forward)]
        pairs.append(("forward + backward, share of dense", ours.get("total_of_dense"), goal.second))
    return [
        {"goal": f"{name}: {what}", "wanted": wanted, "value": value, "verdict": _verdict(value, wanted, counts)}
        for what, value, wanted in pairs
    ]


def _case_goals(case: dict[str, Any], counts: bool) -> list[dict[str, Any]]:
    """Goals that every case has: ahead of each peer, far ahead of grouped_mm, little overhead."""
    name, contestants = case["shape"]["name"], case["contestants"]
    ours = contestants.get(OURS, {})
    goals = []
    for peer, found in contestants.items():
        if peer == OURS or found.get("error") or ours.get("error"):
            continue
        factor = OVER_GROUPED_MM_LAYER if peer == "torch._grouped_mm" else 1.0
        trains = found["total_ms"] is not None and ours["total_ms"] is not None
        key, what = ("total_ms", "forward + backward") if trains else ("forward_ms", "forward")
        ratio = found[key] / ours[key]
        verdict = _verdict(ratio, factor, counts)
        goals.append({"goal": f"{name}: times {peer}, layer {what}", "wanted": factor, "value": ratio, "verdict": verdict})
    for row in case["kernels"]:
        if row["seconds"].get("torch._grouped_mm") and row["seconds"].get(OURS):
            ratio = row["seconds"]["torch._grouped_mm"] / row["seconds"][OURS]
            verdict = _verdict(ratio, OVER_GROUPED_MM_KERNEL, counts)
            what = f"{name}: times torch._grouped_mm, kernel {row['kernel']}"
            goals.append({"goal": what, "wanted": OVER_GROUPED_MM_KERNEL, "value": ratio, "verdict": verdict})
    share = case["overhead_share"]
    verdict = _verdict(share, MAX_OVERHEAD_SHARE, counts, at_most=True)
    what = f"{name}: router + permutation + combine, share of the forward (at most)"
    goals.append({"goal": what, "wanted": MAX_OVERHEAD_SHARE, "value": share, "verdict": verdict})
    return goals


def goals(record: dict[str, Any], shapes: tuple[MoEShape, ...]) -> list[dict[str, Any]]:
    """One verdict per goal, on learned-like routing: met, missed, or unmeasured (also whatever was not measured on a GPU)."""
    counts, listed = record["device_type"] == "cuda", []
    cases = {case["shape"]["name"]: case for case in record["cases"] if case["routing"] == "learned"}
    for shape in shapes:
        case = cases.get(shape.name)
        if shape.goal is not None:
            ours = {} if case is None else case["contestants"].get(OURS, {})
            listed += _shape_goals(shape.name, shape.goal, ours, counts)
        if case is not None:
            listed += _case_goals(case, counts)
    return listed


def _number(value: float | None, form: str = ".3g") -> str:
    return "–" if value is None else format(value, form)


def _case_lines(case: dict[str, Any]) -> list[str]:
    shape, bound = case["shape"], case["roofline_tflops"]
    head = f"{shape['tokens']} tokens, {shape['d_model']} / {shape['d_ff']}, {shape['n_experts']} experts, top-{shape['top_k']}"
    lines = [
        f"### {shape['name']}, {case['routing']} routing",
        "",
        f"{head}; rows per expert {case['rows_min']} to {case['rows_max']}. Roofline {bound[0]:.0f} TFLOP/s forward, "
        f"{bound[1]:.0f} with backward.",
        "",
        "| layer | fwd ms | fwd TFLOP/s | of dense | fwd+bwd ms | TFLOP/s | of dense | bwd TFLOP/s | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in case["contestants"].items():
        if found.get("error"):
            lines.append(f"| {name} | {found['error']} | | | | | | | |")
            continue
        keys = ["forward_ms", "forward_tflops", "forward_of_dense", "total_ms", "total_tflops", "total_of_dense"]
        keys += ["backward_tflops", "peak_gib"]
        lines.append(f"| {name} | " + " | ".join(_number(found[key], ".4g") for key in keys) + " |")
    lines += ["", "| kernel alone | " + " | ".join(case["kernels"][0]["seconds"]) + " | (TFLOP/s)", "|---|---|---|---|"]
    for row in case["kernels"]:
        speeds = [_number(None if time is None else tflops(row["flops"], time), ".4g") for time in row["seconds"].values()]
        lines.append(f"| {row['kernel']} | " + " | ".join(speeds) + " | |")
    parts = ", ".join(f"{name} {seconds * 1e6:.0f} µs" for name, seconds in case["overhead_s"].items())
    lines += [
        "",
        f"Around the products, forward: {parts}; {100 * case['overhead_share']:.1f} % of the layer with its router.",
        "",
    ]
    return lines


def markdown(record: dict[str, Any]) -> str:
    """The whole record for a reader."""
    lines = [f"# MoE layer, {record['date']}", ""]
    lines += [f"- **{name}:** {value}" for name, value in record["environment"].items()]
    lines += [
        f"- **command:** `{record['command']}`",
        f"- **dtype:** {record['dtype']}; medians over {record['rounds']} interleaved rounds; {record['note']}",
        f"- **dense 8192³ product in the same run:** {_number(record['dense_square_tflops'], '.4g')} TFLOP/s",
        "",
        "## Goals",
        "",
        "| goal | wanted | measured | |",
        "|---|---|---|---|",
    ]
    for goal in record["goals"]:
        shown = _number(goal["value"]) if goal["verdict"] != "unmeasured" else "–"
        lines.append(f"| {goal['goal']} | {goal['wanted']} | {shown} | {goal['verdict']} |")
    lines += ["", "## Published by others", "", *published_lines(), "", "## Measurements", ""]
    for case in record["cases"]:
        lines += _case_lines(case)
    return "\n".join(lines)
