"""Time, TFLOP/s and MFU of training steps at full width: some layers of a preset, learned and forced-balanced routing.

A step is forward, backward, clipping and fused AdamW through the engine that `megagrin train` uses. FLOPs are the model's (see
megagrin/planning/flops.py): with few layers the head weighs more than in the whole model.

    python benchmarks/model_step.py [--preset grin_16x3_8b] [--layers 2] [--sequences 2] [--smoke]
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
    tokens = batch(model, options.sequences, options.seq_len)
    seconds, loss, counts_LE = [], float("nan"), None
    for step in range(options.warmup + options.steps):
        start = time.perf_counter()
        result = engine.train_step([tokens], step, 1e-4)  # reads the loss: the device is done when it returns
        if step >= options.warmup:
            seconds.append(time.perf_counter() - start)
        loss, counts_LE = result.loss, result.counts_LE
    assert counts_LE is not None
    per_token = flops_per_token(model, options.seq_len)
    n_tokens, step_s = tokens.tokens_BS.numel(), statistics.median(seconds)
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


def profile(engine: NativeEngine, model: ModelConfig, options: argparse.Namespace) -> str:
    """Operators of one step by their own time on the device (on the CPU without one), as a table."""
    tokens = batch(model, options.sequences, options.seq_len)
    cuda = engine.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        engine.train_step([tokens], options.warmup + options.steps, 1e-4)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=70)


def parse(argv: list[str]) -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="grin_16x3_8b", choices=[name for name, model in PRESETS.items() if model.is_moe])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/model_step"), help="folder for model_step.json")
    parser.add_argument("--profile", action="store_true", help="also write model_profile.txt: one step by operator")
    parser.add_argument("--smoke", action="store_true", help="grin_tiny in fp32 on the CPU")
    options = parser.parse_args(argv)
    if options.smoke:
        options.preset, options.layers, options.sequences, options.seq_len, options.steps, options.warmup = (
            "grin_tiny",
            1,
            1,
            64,
            2,
            1,
        )
    return options


def main(argv: list[str]) -> int:
    """Measure both routings and write them down."""
    options = parse(argv)
    if not options.smoke and not torch.cuda.is_available():
        print("model_step: torch sees no CUDA device; --smoke runs on a CPU", file=sys.stderr)
        return 2
    model = dataclasses.replace(PRESETS[options.preset], n_layers=options.layers)
    record: dict[str, Any] = {
        "environment": environment(),
        "model": dataclasses.asdict(model),
        "tokens": options.sequences * options.seq_len,
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
                torch.cuda.reset_peak_memory_stats(runtime.device)
        if options.profile:
            (options.out / "model_profile.txt").write_text(profile(engine, model, options) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
