"""Training throughput of grin_tiny against transformers' phimoe on this machine's CPU: same shape, same tokens, one run.

Steps of all contestants are interleaved (A B C A B C …), so that a noisy neighbour meets them alike, and the median counts. A
step is forward, backward, clipping and fused AdamW. Ours runs through the engine that `megagrin train` uses, with sampled
routing, balance loss and statistics; phimoe samples, too, without a balance loss. In bf16 ours keeps fp32 masters, phimoe is
cast to bf16 as a whole, which is less work.

    python benchmarks/cpu_vs_transformers.py [--rounds 9] [--out benchmarks/results/…]
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megagrin.data.loader import Batch
from megagrin.distributed.mesh import ParallelConfig, build_mesh
from megagrin.distributed.runtime import RuntimeConfig, session
from megagrin.engines.base import EngineConfig
from megagrin.engines.native import NativeEngine
from megagrin.models.grin import GRIN_TINY as MODEL
from megagrin.moe.balance import BalanceConfig
from megagrin.moe.router import RouterConfig
from megagrin.optim.optimizer import OptimConfig

SEQUENCES, SEQ = 16, 256
LR = 1e-3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEER_MODES = ("eager", "grouped_mm")  # batched_mm copies the weights for every token: out of memory at this size


def tokens() -> torch.Tensor:
    """Zipf-like token ids, (SEQUENCES, SEQ + 1)."""
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, MODEL.vocab_size + 1, dtype=torch.float32)
    return torch.multinomial(weights, SEQUENCES * (SEQ + 1), replacement=True, generator=generator).view(SEQUENCES, SEQ + 1)


def our_step(dtype: str) -> Callable[[int], float]:
    """A step of the native engine in one process."""
    engine = NativeEngine(
        MODEL,
        RouterConfig(),
        BalanceConfig(),
        OptimConfig(),
        EngineConfig(dtype=dtype),  # type: ignore[arg-type]
        build_mesh(ParallelConfig(), "cpu"),
        torch.device("cpu"),
        seed=0,
    )
    text = tokens()
    positions = torch.arange(SEQ).expand(SEQUENCES, SEQ)
    index = torch.arange(SEQUENCES * SEQ).view(SEQUENCES, SEQ)
    batch = Batch(text[:, :-1], text[:, 1:], positions, None, index)
    return lambda step: engine.train_step([batch], step, LR).loss


def peer_step(dtype: str, mode: str) -> Callable[[int], float]:
    """A step of transformers' phimoe with one of its experts implementations."""
    from transformers import PhimoeConfig, PhimoeForCausalLM

    torch.manual_seed(0)
    config = PhimoeConfig(
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.d_model,
        intermediate_size=MODEL.d_ff,
        num_hidden_layers=MODEL.n_layers,
        num_attention_heads=MODEL.n_heads,
        num_key_value_heads=MODEL.n_kv_heads,
        num_local_experts=MODEL.n_experts,
        num_experts_per_tok=MODEL.top_k,
        max_position_embeddings=MODEL.max_positions,
        sliding_window=MODEL.window,
        attention_bias=MODEL.attention_bias,
        lm_head_bias=MODEL.lm_head_bias,
        rope_parameters={"rope_type": "default", "rope_theta": MODEL.rope_theta},
    )
    model: Any = PhimoeForCausalLM(config)
    model.to(DTYPES[dtype]).train()
    model.set_experts_implementation(mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    text = tokens()

    def step(_: int) -> float:
        logits = model(input_ids=text[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(dtype: str, rounds: int) -> dict[str, float]:
    """Median tokens per second of each contestant, steps interleaved; the first two rounds warm up."""
    contestants = {"megagrin": our_step(dtype)} | {f"transformers {mode}": peer_step(dtype, mode) for mode in PEER_MODES}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds + 2):
        for name, step in contestants.items():
            start = time.perf_counter()
            step(round_)
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: SEQUENCES * SEQ / statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    """Measure both dtypes, print the ratios, and write them down where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    import transformers

    record: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "shape": {"sequences": SEQUENCES, "seq": SEQ, "parameters": MODEL.parameter_counts()[0]},
    }
    with session(RuntimeConfig(device="cpu")):
        for dtype in DTYPES:
            rates = measure(dtype, options.rounds)
            best = max(rate for name, rate in rates.items() if name != "megagrin")
            ratio = rates["megagrin"] / best
            record[dtype] = {"tokens_per_second": rates, "ratio_to_faster_peer": ratio}
            for name, rate in rates.items():
                print(f"{dtype}  {name:<24}{rate:>9,.0f} tokens/s", flush=True)
            print(f"{dtype}  ratio to the faster peer {ratio:.2f}", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
