"""The MoE layer against its peers on one GPU: one run, the same tensors, interleaved.

FLOPs count real routed rows only. Two routings side by side: learned-like (lognormal, sigma 0.3) and balanced. Data is random,
several sets of inputs rotate, medians count. Each time stands beside a dense cuBLAS product of the same FLOPs in the same rounds
and the roofline at that rate.

    python benchmarks/moe_layer.py [--out FOLDER] [--rounds 7] [--only grin-8k] [--contestant megagrin] [--smoke]

--smoke runs every code path with tiny shapes, in fp32 on a CPU, where times mean nothing and agreement means everything.
"""

import argparse
import dataclasses
import datetime
import json
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from moe_contestants import CONTESTANTS, Layer, Problem, build, differences, disagreement
from moe_report import OURS, environment, goals, markdown, rates, tflops
from moe_shapes import ROUTINGS, SHAPES, SMOKE_SHAPES, TILE_ROWS, WGRAD_STEP, MoEShape, bound_tflops, roofline, tiles
from timing import interleaved, peak_bytes
from torch import Tensor

from megagrin.kernels.grouped_gemm import k_grouped_wgrad, m_grouped, m_grouped_dgrad
from megagrin.kernels.permute import permute, sort_by_expert
from megagrin.moe.dispatch import LocalDispatch
from megagrin.moe.router import Draws, Router, RouterConfig, Routing


class Dense:
    """cuBLAS products of the layer's FLOPs: every row through one expert."""

    def __init__(self, problem: Problem) -> None:
        shape, like = problem.shape, problem.down_EDF.detach()
        self.up, self.down = problem.gate_up_E2FD.detach()[0], like[0]
        self.x = torch.randn(shape.rows, shape.d_model, device=like.device, dtype=like.dtype)
        self.h = torch.randn(shape.rows, 2 * shape.d_ff, device=like.device, dtype=like.dtype)
        self.act = torch.randn(shape.rows, shape.d_ff, device=like.device, dtype=like.dtype)

    def forward(self, number: int) -> None:
        """Up and down: 6·R·D·F."""
        torch.mm(self.x, self.up.t())
        torch.mm(self.act, self.down.t())

    def total(self, number: int) -> None:
        """With both dgrads and both wgrads."""
        self.forward(number)
        torch.mm(self.x, self.down)
        torch.mm(self.h, self.up)
        torch.mm(self.x.t(), self.act)
        torch.mm(self.h.t(), self.x)


def kernel_rows(problem: Problem) -> list[dict[str, Any]]:
    """The grouped products by themselves, ours and torch's: name, FLOPs and calls."""
    shape = problem.shape
    counts_E = torch.tensor(problem.counts, device=problem.down_EDF.device)
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    up, down = problem.gate_up_E2FD.detach(), problem.down_EDF.detach()

    def rows(width: int) -> Tensor:
        return torch.randn(shape.rows, width, device=up.device, dtype=up.dtype)

    x, h, act = rows(shape.d_model), rows(2 * shape.d_ff), rows(shape.d_ff)
    up_flops = 4.0 * shape.rows * shape.d_model * shape.d_ff
    torch_mm = torch._grouped_mm
    calls: list[tuple[str, float, Callable[[int], Tensor], Callable[[int], Tensor]]] = [
        (
            *("up", up_flops, lambda _: m_grouped(x, up, counts_E)),
            lambda _: torch_mm(x, up.transpose(1, 2), offs=offsets_E),
        ),
        (
            *("down", up_flops / 2, lambda _: m_grouped(act, down, counts_E)),
            lambda _: torch_mm(act, down.transpose(1, 2), offs=offsets_E),
        ),
        ("up dgrad", up_flops, lambda _: m_grouped_dgrad(h, up, counts_E), lambda _: torch_mm(h, up, offs=offsets_E)),
        ("up wgrad", up_flops, lambda _: k_grouped_wgrad(h, x, counts_E), lambda _: torch_mm(h.t(), x, offs=offsets_E)),
    ]
    return [
        {"kernel": name, "flops": flops, "calls": {OURS: ours, "torch._grouped_mm": theirs}}
        for name, flops, ours, theirs in calls
    ]


def overheads(problem: Problem) -> dict[str, Callable[[int], object]]:
    """What the layer does around its products, forward, as the model calls it."""
    shape, inputs = problem.shape, problem.sets[0]
    device = inputs.x_TD.device
    router = Router(shape.d_model, shape.n_experts, shape.top_k, 0, RouterConfig()).to(device)
    torch.nn.init.normal_(router.weight, std=0.02)
    dispatch, token_T = LocalDispatch(shape.n_experts), torch.arange(shape.tokens, device=device)
    routing = Routing(inputs.expert_TK, inputs.weight_TK.detach(), None)
    x_TD = inputs.x_TD.detach()
    sent = dispatch.dispatch(x_TD, routing)
    y_RD = torch.randn(shape.rows, shape.d_model, device=device, dtype=x_TD.dtype)
    plan = sort_by_expert(inputs.expert_TK, shape.n_experts)
    return {
        "router": lambda step: router(x_TD, Draws(0, step, token_T)),
        "dispatch": lambda _: dispatch.dispatch(x_TD, routing),
        # The rows' copy is made inside the expert MLP.
        "gather": lambda _: permute(x_TD, plan),
        "combine": lambda _: dispatch.combine(y_RD, sent),
    }


def take_part(problem: Problem, dtype: torch.dtype, names: list[str]) -> tuple[dict[str, Layer], dict[str, dict[str, Any]]]:
    """Contestants of these names that are installed, run and agree with ours; and why the others do not take part."""
    layers, refused = {}, {}
    expected: dict[str, Tensor] = {}
    for contestant in (contestant for contestant in CONTESTANTS if contestant.name in names):
        error, apart = contestant.missing(), {}
        if error is None:
            try:
                layer = Layer(contestant, problem)
                results = layer.results()
                expected = expected or results
                apart = differences(results, expected)
                error = disagreement(apart, dtype)
            except Exception as failure:  # a peer's error, whatever its type, is a line in the report
                if contestant.name == OURS:
                    raise
                error = f"{type(failure).__name__}: {str(failure).splitlines()[0][:120] if str(failure) else 'no message'}"
        if error is None:
            layers[contestant.name] = layer
            print(f"  {contestant.name}: agrees, largest difference {max(apart.values()):.1e}", flush=True)
        else:
            refused[contestant.name] = {"error": error}
            print(f"  {contestant.name}: {error}", flush=True)
    return layers, refused


def measure(
    shape: MoEShape, routing: str, options: argparse.Namespace, device: torch.device, terabytes_per_second: float
) -> dict[str, Any]:
    """Everything about one shape and routing."""
    dtype = torch.float32 if options.smoke else torch.bfloat16
    print(f"{shape.name}, {routing} routing", flush=True)
    problem = build(shape, routing, device, dtype)
    layers, contestants = take_part(problem, dtype, options.contestant)
    dense, around, rows = Dense(problem), overheads(problem), kernel_rows(problem)
    tasks: dict[tuple[str, str], Callable[[int], object]] = {("dense", "forward"): dense.forward, ("dense", "total"): dense.total}
    for name, layer in layers.items():
        tasks[name, "forward"] = layer.forward
        if layer.contestant.trains:
            tasks[name, "total"] = layer.forward_backward
    tasks |= {("around", name): call for name, call in around.items()}
    for row in rows:
        tasks |= {(row["kernel"], name): call for name, call in row["calls"].items()}
    named = interleaved(
        {" / ".join(key): call for key, call in tasks.items()}, device, rounds=options.rounds, pause_s=options.pause
    )
    seconds = {key: named[" / ".join(key)] for key in tasks}
    dense_s = {part: seconds["dense", part] for part in ("forward", "total")}
    for name, layer in layers.items():
        own = {part: seconds[name, part] for part in ("forward", "total") if (name, part) in seconds}
        train = layer.contestant.trains
        peak = peak_bytes(lambda layer=layer, train=train: layer.forward_backward(0) if train else layer.forward(0), device)  # type: ignore[misc]
        contestants[name] = {**rates(shape, own, dense_s), "peak_gib": None if peak is None else peak / 2**30, "error": None}
    overhead_s = {name: seconds["around", name] for name in around}
    dense_rate = tflops(shape.forward_flops + shape.backward_flops, dense_s["total"])
    m_tiles, k_steps = (tiles(problem.counts, step) for step in (TILE_ROWS, WGRAD_STEP))
    bounds = roofline(shape, m_tiles, k_steps, dense_tflops=dense_rate, terabytes_per_second=terabytes_per_second)
    return {
        "shape": dataclasses.asdict(shape),
        "routing": routing,
        "rows_min": min(problem.counts),
        "rows_max": max(problem.counts),
        "dense_tflops": {"forward": tflops(shape.forward_flops, dense_s["forward"]), "total": dense_rate},
        "roofline_tflops": bound_tflops(shape, bounds),
        "contestants": {name: contestants[name] for name in options.contestant},
        "kernels": [
            {
                "kernel": row["kernel"],
                "flops": row["flops"],
                "seconds": {name: seconds[row["kernel"], name] for name in row["calls"]},
            }
            for row in rows
        ],
        "overhead_s": overhead_s,
        "overhead_share": sum(overhead_s.values()) / (overhead_s["router"] + seconds[OURS, "forward"]),
    }


def dense_square(device: torch.device, size: int) -> float:
    """TFLOP/s of a square bf16 product of random numbers."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = interleaved({"mm": lambda _: torch.mm(a, b)}, device, rounds=5, pause_s=0.05)["mm"]
    return tflops(2.0 * size**3, seconds)


def copy_rate(device: torch.device, size: int) -> float:
    """TB/s of a copy of `size` bytes inside the device, bytes read and written."""
    source = torch.randint(256, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda _: target.copy_(source)}, device, rounds=5, pause_s=0.05)["copy"]
    return 2.0 * size / seconds / 1e12


def write(record: dict[str, Any], folder: Path) -> None:
    """moe_layer.json and moe_layer.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "moe_layer.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "moe_layer.md").write_text(markdown(record))


def parse(argv: list[str]) -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/moe_layer"), help="folder for the JSON and the markdown file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pause", type=float, default=0.02, help="idle seconds before each measurement")
    parser.add_argument("--only", action="append", help="name of a shape; repeatable")
    names = [contestant.name for contestant in CONTESTANTS]
    parser.add_argument("--contestant", action="append", choices=names, help=f"who is measured, {OURS} among them; repeatable")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further case after this time")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes in fp32 on the CPU")
    options = parser.parse_args(argv)
    wanted = options.contestant or names
    options.contestant = [name for name in names if name in wanted or name == OURS]
    return options


def main(argv: list[str]) -> int:
    """Measure, print, write after every case: a run that is stopped leaves what it has."""
    options = parse(argv)
    shapes = SMOKE_SHAPES if options.smoke else tuple(s for s in SHAPES if options.only is None or s.name in options.only)
    if not options.smoke and not torch.cuda.is_available():
        print("moe_layer: torch sees no CUDA device; --smoke runs on a CPU", file=sys.stderr)
        return 2
    if not shapes:
        print(f"moe_layer: --only {options.only}: shapes are {', '.join(shape.name for shape in SHAPES)}", file=sys.stderr)
        return 2
    device, start = torch.device("cpu" if options.smoke else "cuda"), time.monotonic()
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "benchmarks/moe_layer.py", *argv]),
        "environment": environment(),
        "device_type": device.type,
        "dtype": "fp32" if options.smoke else "bf16",
        "rounds": options.rounds,
        "note": "weight gradients in the weights' dtype; peers that are absent or differ are named with the reason",
        "dense_square_tflops": dense_square(device, 256 if options.smoke else 8192),
        "copy_terabytes_per_second": copy_rate(device, 1 << (20 if options.smoke else 32)),
        "cases": [],
        "left_out": [],
    }
    failed = False
    for routing in ROUTINGS:
        for shape in shapes:
            if time.monotonic() - start > options.seconds:
                record["left_out"].append(f"{shape.name}, {routing}: out of time")
            else:
                try:
                    case = measure(shape, routing, options, device, record["copy_terabytes_per_second"])
                    record["cases"].append(case)
                except Exception as error:  # one shape that fails, whatever the reason, does not cost the others
                    traceback.print_exc()
                    record["left_out"].append(f"{shape.name}, {routing}: {type(error).__name__}: {str(error)[:120]}")
                    failed = True
            record["goals"] = goals(record, SMOKE_SHAPES if options.smoke else SHAPES)
            write(record, options.out)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(markdown(record))
    print("\n".join(record["left_out"]))
    print(f"written to {options.out}/moe_layer.json and moe_layer.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
