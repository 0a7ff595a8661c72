"""Time, TFLOP/s and MFU of training steps at full width: some layers of a preset, learned and forced-balanced routing.

A step is forward, backward, clipping and fused AdamW through the engine that `megagrin train` uses. FLOPs are the model's (see
megagrin/planning/flops.py): with few layers the head weighs more than in the whole model.

    python benchmarks/model_step.py [--preset grin_16x3_8b] [--layers 2] [--sequences 2] [--micro_batches 4] [--smoke]
"""

import argparse
import dataclasses
import faulthandler
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import device_memory
import torch
from moe_report import environment

from megagrin.data.loader import Batch
from megagrin.distributed.mesh import ParallelConfig, build_mesh
from megagrin.distributed.runtime import RuntimeConfig, session
from megagrin.engines.base import EngineConfig
from megagrin.engines.native import NativeEngine
from megagrin.models.grin import PRESETS
from megagrin.models.transformer import ModelConfig
from megagrin.moe.balance import BalanceConfig
from megagrin.moe.router import Router, RouterConfig
from megagrin.optim.optimizer import OptimConfig
from megagrin.planning.flops import flops_per_token, peak_flops

# Of a profile, in the JSON file.
KERNELS = 25


def batch(model: ModelConfig, sequences: int, seq_len: int, seed: int = 0) -> Batch:
    """Zipf-like random tokens."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, model.vocab_size + 1, dtype=torch.float32)
    text = torch.multinomial(weights, sequences * (seq_len + 1), replacement=True, generator=generator).view(sequences, -1)
    index = torch.arange(sequences * seq_len).view(sequences, seq_len)
    return Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), index % seq_len, None, index)


def build_engine(model: ModelConfig, device: torch.device, dtype: str, compiled: bool = False) -> NativeEngine:
    """The native engine on this one device."""
    config = EngineConfig(dtype=dtype, zero=1, compile=compiled)  # type: ignore[arg-type]
    mesh = build_mesh(ParallelConfig(), device.type)
    return NativeEngine(model, RouterConfig(), BalanceConfig(), OptimConfig(), config, mesh, device, seed=0)


def measure(engine: NativeEngine, model: ModelConfig, options: argparse.Namespace, forced_balance: bool) -> dict[str, Any]:
    """Median step time of one routing."""
    device = engine.device
    for layer in engine.model.modules():
        if isinstance(layer, Router):
            layer.config = dataclasses.replace(layer.config, forced_balance=forced_balance)
    tokens = [batch(model, options.sequences, options.seq_len, seed) for seed in range(options.micro_batches)]
    device_memory.reset_peaks()
    begin = time.monotonic()
    seconds, loss, counts_LE = [], float("nan"), None
    for step in range(options.warmup + options.steps):
        start = time.perf_counter()
        result = engine.train_step(tokens, step, 1e-4)  # reads the loss: the device is done when it returns
        if step >= options.warmup:
            seconds.append(time.perf_counter() - start)
        loss, counts_LE = result.loss, result.counts_LE
        if seconds and time.monotonic() - begin > options.seconds / 2:
            break
    assert counts_LE is not None
    per_token = flops_per_token(model, options.seq_len)
    n_tokens, step_s = sum(part.tokens_BS.numel() for part in tokens), statistics.median(seconds)
    rate = per_token * n_tokens / step_s
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "routing": "forced balance" if forced_balance else "learned",
        "step_ms": step_s * 1e3,
        "tokens_per_second": n_tokens / step_s,
        "tflops": rate / 1e12,
        "mfu": rate / peak_flops(device, torch.float32 if options.smoke else torch.bfloat16),
        "peak_gib": memory,
        "largest_load": float(counts_LE.max() / counts_LE[0].sum()),
        "loss": loss,
    }


def profile(engine: NativeEngine, model: ModelConfig, options: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """One step by time on the device (on the CPU without one): a table of operators and kernels, and the first kernels."""
    tokens = [batch(model, options.sequences, options.seq_len, seed) for seed in range(options.micro_batches)]
    cuda = engine.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        engine.train_step(tokens, options.warmup + options.steps, 1e-4)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    averages = profiler.key_averages()
    table = averages.table(sort_by=key, row_limit=40, max_name_column_width=70)
    # What runs on the device only: an operator's own device time is that of the kernels it starts, which are listed, too.
    rows = [row for row in averages if not cuda or row.device_type == torch.autograd.DeviceType.CUDA]
    rows.sort(key=lambda row: -getattr(row, key))
    return table, [{"name": row.key, "ms": getattr(row, key) / 1e3, "calls": row.count} for row in rows[:KERNELS]]


def parse(argv: list[str]) -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="grin_16x3_8b", choices=[name for name, model in PRESETS.items() if model.is_moe])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--micro_batches", type=int, default=1, help="of --sequences each, whose gradients a step adds up")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="begin no further step after this time, half of it for each routing"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/model_step"), help="folder for model_step.json")
    parser.add_argument("--profile", action="store_true", help="also write model_profile.txt: one step by operator")
    parser.add_argument("--smoke", action="store_true", help="grin_tiny in fp32 on the CPU")
    options = parser.parse_args(argv)
    if options.smoke:
        options.preset, options.layers, options.sequences = "grin_tiny", 1, 1
        options.seq_len, options.steps, options.warmup = options.seq_len // 64, 2, 1
    return options


def main(argv: list[str]) -> int:
    """Measure both routings and write them down."""
    options = parse(argv)
    if not options.smoke and not torch.cuda.is_available():
        print("model_step: torch sees no CUDA device; --smoke runs on a CPU", file=sys.stderr)
        return 2
    preset = PRESETS[options.preset]
    longest = max(preset.max_positions, options.seq_len)
    model = dataclasses.replace(preset, n_layers=options.layers, max_positions=longest)
    record: dict[str, Any] = {
        "environment": environment(),
        "model": dataclasses.asdict(model),
        "tokens": options.micro_batches * options.sequences * options.seq_len,
        "results": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    faulthandler.dump_traceback_later(45, repeat=True)  # a stage that runs out of its time leaves where it was
    with session(RuntimeConfig(device="cpu" if options.smoke else "cuda")) as runtime:
        engine = build_engine(model, runtime.device, "fp32" if options.smoke else "bf16")
        for forced_balance in (False, True):
            found = measure(engine, model, options, forced_balance)
            record["results"].append(found)
            print(
                "  ".join(
                    f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
                )
            )
            (options.out / "model_step.json").write_text(json.dumps(record, indent=1) + "\n")
            if runtime.device.type == "cuda":
                torch.cuda.empty_cache()
        if options.profile:
            table, record["profile"] = profile(engine, model, options)
            (options.out / "model_profile.txt").write_text(table + "\n")
            (options.out / "model_step.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
