"""What the parallel engine costs where nothing is parallel: one process, every degree 1, against a loop without parallel code.

Both train the same model from the same weights on the same tokens: sampled routing, balance loss, clipping, fused AdamW, and the
statistics of a step. The plain loop has no process group, no mesh, no FSDP and no DTensor. Steps alternate and swap their order
every round, so that a noisy neighbour meets both alike; processor time is counted, which others' load moves least; the ratio of
each pair of steps is taken, and the median counts.

    python benchmarks/parallel_overhead.py [--rounds 41] [--sequences 4] [--sequence-length 256]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from megagrin.data.loader import Batch
from megagrin.distributed.mesh import ParallelConfig, build_mesh
from megagrin.distributed.runtime import RuntimeConfig, session
from megagrin.engines.base import EngineConfig
from megagrin.engines.native import NativeEngine
from megagrin.models.grin import GRIN_TINY as MODEL
from megagrin.models.init import init_parameters
from megagrin.models.transformer import Transformer
from megagrin.moe.balance import BalanceConfig, balance_loss, load_fraction
from megagrin.moe.layer import TrainRouting
from megagrin.moe.router import Draws, RouterConfig
from megagrin.optim.optimizer import OptimConfig, build_optimizer

LR, SEED = 1e-3, 0


def tokens(sequences: int, length: int) -> Batch:
    """A micro-batch of Zipf-like token ids."""
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, MODEL.vocab_size + 1, dtype=torch.float32)
    text_BS = torch.multinomial(weights, sequences * (length + 1), replacement=True, generator=generator).view(sequences, -1)
    positions_BS = torch.arange(length).expand(sequences, length)
    index_BS = torch.arange(sequences * length).view(sequences, length)
    return Batch(text_BS[:, :-1], text_BS[:, 1:], positions_BS, None, index_BS)


def engine_step(batch: Batch, dtype: str) -> Callable[[int], float]:
    """A step of the native engine on a group of one."""
    mesh = build_mesh(ParallelConfig(), "cpu")
    config = EngineConfig(dtype=dtype)  # type: ignore[arg-type]
    engine = NativeEngine(MODEL, RouterConfig(), BalanceConfig(), OptimConfig(), config, mesh, torch.device("cpu"), SEED)
    return lambda step: engine.train_step([batch], step, LR).loss


def plain_step(batch: Batch) -> Callable[[int], float]:
    """The same step in fp32, written as one would without any parallelism."""
    optim = OptimConfig()
    model = Transformer(MODEL)
    init_parameters(model, MODEL, SEED)
    optimizer = build_optimizer(model, optim, torch.float32)
    parameters = list(model.parameters())
    load_LE = torch.full((MODEL.n_layers, MODEL.n_experts), 1 / MODEL.n_experts)
    count = batch.tokens_BS.numel()

    def step(index: int) -> float:
        nonlocal load_LE
        train = TrainRouting(Draws(SEED, index, batch.token_index_BS.flatten()), count, load_LE)
        output = model(batch.tokens_BS, batch.labels_BS, batch.positions_BS, None, train)
        assert output.loss_sum is not None
        assert output.stats is not None
        (output.loss_sum / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = LR
        optimizer.step()
        optimizer.zero_grad()
        load_LE = load_fraction(output.stats.counts_LE)
        balance_loss(load_LE, output.stats.prob_sum_LE / count).mean().item()
        return output.loss_sum.item() / count

    return step


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)
    options = parser.parse_args()
    batch = tokens(options.sequences, options.sequence_length)
    with session(RuntimeConfig(device="cpu")):
        contestants = {"engine": engine_step(batch, "fp32"), "plain": plain_step(batch)}
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        losses: dict[str, float] = {}
        for round_ in range(options.rounds + 3):
            order = list(contestants) if round_ % 2 else list(reversed(contestants))
            for name in order:
                start = time.process_time()
                losses[name] = contestants[name](round_)
                seconds[name].append(time.process_time() - start)
    warm = {name: times[3:] for name, times in seconds.items()}
    ratios = [ours / plain for ours, plain in zip(warm["engine"], warm["plain"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    difference = abs(losses["engine"] / losses["plain"] - 1)
    print(f"shape      {options.sequences} x {options.sequence_length} tokens, fp32")
    print(f"step       engine {statistics.median(warm['engine']):.4f} s, plain {statistics.median(warm['plain']):.4f} s")
    print(f"ratio      {statistics.median(ratios):.3f} (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}, {len(ratios)} pairs)")
    print(f"last loss  differs by {difference:.1e} relative")


if __name__ == "__main__":
    main()
