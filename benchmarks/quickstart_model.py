"""The quickstart's model (launch/recipes/quickstart.yaml) for some steps; its tokens are bytes of the standard library.

    python benchmarks/quickstart_model.py [--device cuda] [--steps 450] [--seconds 14] [--out FOLDER]

Ends with status 1 where the loss on a batch that is not trained on has not fallen.
"""

import argparse
import dataclasses
import faulthandler
import json
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import recipe
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
from megagrin.moe.router import RouterConfig
from megagrin.optim.optimizer import OptimConfig
from megagrin.optim.schedule import learning_rate

RECIPE = Path(__file__).resolve().parents[1] / "launch" / "recipes" / "quickstart.yaml"
Section = dict[str, Any]


def model_of(section: Section) -> ModelConfig:
    """The recipe's model: its preset with what the recipe changes."""
    return dataclasses.replace(PRESETS[section["preset"]], **section)


def corpus() -> torch.Tensor:
    """Bytes of the standard library's modules in order of name, int64."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return torch.frombuffer(
        bytearray(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))), dtype=torch.uint8
    ).long()


def batches(text_N: torch.Tensor, train: Section, step: int) -> list[Batch]:
    """The micro-batches of a step: pieces of text at random places."""
    n_sequences, seq_len = train["global_batch_size"], train["seq_len"]
    starts = torch.randint(len(text_N) - seq_len, (n_sequences,), generator=torch.Generator().manual_seed(step))
    pieces = torch.stack([text_N[start : start + seq_len + 1] for start in starts.tolist()])
    index = torch.arange(n_sequences * seq_len).view(n_sequences, seq_len)
    whole = (pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous(), index % seq_len, index)
    parts = zip(*(part.split(train["micro_batch_size"]) for part in whole), strict=True)
    return [Batch(tokens, labels, positions, None, place) for tokens, labels, positions, place in parts]


def build_engine(settings: dict[str, Section], device: torch.device) -> NativeEngine:
    """The recipe's engine on one device."""
    dtype = "bf16" if device.type == "cuda" else "fp32"
    config = EngineConfig(dtype=dtype, zero=settings["engine"]["zero"])  # type: ignore[arg-type]
    balance, optim = BalanceConfig(**settings["balance"]), OptimConfig(**settings["optim"])
    mesh = build_mesh(ParallelConfig(), device.type)
    return NativeEngine(model_of(settings["model"]), RouterConfig(), balance, optim, config, mesh, device, seed=0)


def train(engine: NativeEngine, settings: dict[str, Section], steps: int, seconds: float) -> dict[str, Any]:
    """Some steps, and the loss on pieces that no step sees, before and after."""
    text_N, section, start = corpus(), settings["train"], time.monotonic()
    held_out = batches(text_N, section, section["steps"])
    first_loss, taken = engine.evaluate(held_out), list[float]()
    for step in range(steps):
        begin = time.perf_counter()
        engine.train_step(batches(text_N, section, step), step, learning_rate(engine.optim_config, step, section["steps"]))
        taken.append(time.perf_counter() - begin)
        if time.monotonic() - start > seconds:
            break
    tokens, step_s = section["global_batch_size"] * section["seq_len"], statistics.median(taken)
    return {
        "steps": len(taken),
        "tokens": tokens,
        "first_loss": first_loss,
        "last_loss": engine.evaluate(held_out),
        "step_ms": step_s * 1e3,
        "tokens_per_second": tokens / step_s,
    }


def main(argv: list[str]) -> int:
    """Train, write quickstart.json, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further step after this time")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart_model"), help="folder for quickstart.json")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("quickstart_model: torch sees no CUDA device; --device cpu", file=sys.stderr)
        return 2
    faulthandler.dump_traceback_later(20, repeat=True)  # a stage that runs out of its time leaves where it was
    settings: dict[str, Section] = {name: dict(section) for name, section in recipe.read(RECIPE).items()}
    with session(RuntimeConfig(device=options.device)) as runtime:
        engine = build_engine(settings, runtime.device)
        found = {"environment": environment(), **train(engine, settings, options.steps, options.seconds)}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "quickstart.json").write_text(json.dumps(found, indent=1) + "\n")
    fell = found["last_loss"] < found["first_loss"]
    print(
        f"loss {found['first_loss']:.3f} -> {found['last_loss']:.3f} in {found['steps']} steps: "
        f"{'fell' if fell else 'did NOT fall'}; {found['step_ms']:.1f} ms a step"
    )
    return 0 if fell else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
