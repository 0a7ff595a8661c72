"""One step of a run against formulas: total loss, units of what is logged, and what the seed decides.

A layout compared with one process, or a resumed run with an uninterrupted one, shares its faults with what it is compared to.

Shape suffixes: T tokens, E experts.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import MODEL, OPTIM, Run, build_engine, capture_gradients, full, micro_batches
from test_train import TINY, train, write_tokens
from torch import Tensor

from megagrin import rng
from megagrin.checkpoint import store
from megagrin.distributed.runtime import RuntimeConfig, session
from megagrin.moe.balance import BalanceConfig
from megagrin.moe.layer import TrainRouting
from megagrin.moe.router import Draws, Router, RouterConfig
from megagrin.observe.metrics import read_metrics
from megagrin.planning.flops import flops_per_token
from megagrin.training import loop
from megagrin.training.run_config import RunConfig, parse_config
from megagrin.training.trainer import Trainer


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    with session(RuntimeConfig(device="cpu")):
        yield


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "text")


def logits_of_routers(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list that receives the logits of every router's forward pass, with their graph."""
    seen: list[Tensor] = []
    forward = Router.forward

    def spy(self: Router, x_TD: Tensor, draws: Draws | None) -> Any:
        z_TE, routing = forward(self, x_TD, draws)
        seen.append(z_TE)
        return z_TE, routing

    monkeypatch.setattr(Router, "forward", spy)
    return seen


@pytest.mark.parametrize("scope", ["local", "global", "batch"])
def test_a_step_descends_the_written_out_total_loss(scope: Any, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean cross entropy + Σ over layers of (α·n·Σ_i f_i·P_i + z_coef·mean logsumexp²): GRIN section 3.3, ST-MoE eq. 5.

    The routing is gshard's: its experts are the top k, so that the loss is an ordinary function of the weights.
    """
    alpha, z_coef, n, k = 0.3, 0.07, MODEL.n_experts, MODEL.top_k
    run = Run(
        micro=8,
        router=RouterConfig(kind="gshard"),
        balance=BalanceConfig(scope, alpha, z_coef),
        optim=replace(OPTIM, clip_norm=0.0),
    )
    plain = build_engine(replace(run, balance=BalanceConfig(scope, 0.0, 0.0)))
    (batch,) = micro_batches(run, 0, plain.mesh)
    seen = logits_of_routers(monkeypatch)
    previous_E = torch.arange(1, n + 1) / (n * (n + 1) / 2)  # even loads would have no gradient: Σ P_i is 1
    plain.previous_f_LE.copy_(previous_E)
    routing = TrainRouting(Draws(7, 0, batch.token_index_BS.flatten()), batch.tokens_BS.numel(), plain.previous_f_LE)
    output = plain.model(batch.tokens_BS, batch.labels_BS, batch.positions_BS, train=routing)
    total = output.loss_sum / (batch.labels_BS != -100).sum()
    terms, squares = [], []
    for z_TE in seen:
        p_TE = z_TE.exp() / z_TE.exp().sum(1, keepdim=True)
        counts_E = torch.zeros(n, dtype=torch.float64)
        for expert in z_TE.topk(k).indices.flatten().tolist():
            counts_E[expert] += 1
        f_E = counts_E / (k * z_TE.shape[0])
        terms.append(n * (f_E * p_TE.mean(0)).sum())
        squares.append(z_TE.exp().sum(1).log().square().mean())
        used_E = previous_E.float().double() if scope == "batch" else f_E  # kept in fp32
        total = total + alpha * n * (used_E * p_TE.mean(0)).sum() + z_coef * squares[-1]
    total.backward()
    expected = {name: full(parameter.grad) for name, parameter in plain.model.named_parameters()}

    engine = build_engine(run)
    engine.previous_f_LE.copy_(previous_E)
    gradients = capture_gradients(engine)
    result = engine.train_step([batch], 0, 1e-3)
    for name, gradient in gradients[0].items():
        scale = expected[name.replace("k_proj.bias", "q_proj.bias")].norm()  # a key bias has none in exact arithmetic
        assert (gradient - expected[name]).norm() <= 1e-9 * scale, name
    # What is reported: without coefficients, the mean over layers, with this step's own counts.
    assert result.balance_loss == pytest.approx(torch.stack(terms).mean().item(), rel=1e-9)
    assert result.z_loss == pytest.approx(torch.stack(squares).mean().item(), rel=1e-9)
    assert result.loss == pytest.approx(output.loss_sum.item() / int((batch.labels_BS != -100).sum()), rel=1e-9)


def test_consumed_samples_and_rates_of_a_run(tmp_path: Path, tokens: str) -> None:
    """Batches of 4 sequences: 4, 8, 12 samples; and every rate is the learning-rate formula's."""
    run = tmp_path / "run"
    rate = ["--optim.lr=0.004", "--optim.warmup_steps=2", "--optim.schedule=cosine", "--optim.min_lr_ratio=0"]
    assert train(run, tokens, "--train.steps=3", *rate) == 0
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["consumed_samples"] for row in rows] == [4, 8, 12]
    assert [row["lr"] for row in rows] == pytest.approx([0.002, 0.004, 0.0], abs=1e-15)
    assert store.read_info(store.checkpoints(run)[-1]).consumed_samples == 12
    for row in rows:
        for shares, largest, entropy in zip(row["load"], row["load_max"], row["load_entropy"], strict=True):
            assert sum(shares) == pytest.approx(1)
            assert largest == max(shares)
            assert entropy == pytest.approx(-sum(share * math.log(share) for share in shares if share) / math.log(len(shares)))
        # The peak that MFU is relative to is the same in all rows.
        assert row["mfu"] / row["tokens_per_second"] == pytest.approx(rows[0]["mfu"] / rows[0]["tokens_per_second"], rel=1e-9)


def test_units_of_speed_and_utilization(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 sequences of 32 tokens in half a second are 256 tokens/s of the whole run; MFU divides by the peak of all ranks."""
    run = configured("--train.run_dir=x", "--data.train=x", "--metrics.peak_tflops=0.002")
    clock = iter([10.0, 20.0, 20.5, 22.5])
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    with_ranks = type("Ranks", (), {"device": torch.device("cpu"), "world_size": 4, "is_main": True})()
    rates = loop._Rates(run, with_ranks)
    rates.pause()
    # The model of TINY by hand: 3 passes of 2 FLOPs for each weight that a token meets, and attention's pairs.
    d, layers, heads, kv, head, ff, experts, seq, vocab = 32, 2, 4, run.model.n_kv_heads, 8, 16, 4, 32, 97
    weights = layers * (2 * d * heads * head + 2 * d * kv * head + run.model.top_k * 3 * d * ff + d * experts) + d * vocab
    pairs = sum(min(position + 1, run.model.window) for position in range(seq)) / seq
    flops = 3 * (2 * weights + layers * 4 * heads * head * pairs)
    assert flops_per_token(run.model, seq) == pytest.approx(flops, rel=1e-12)
    for speed in (4 * 32 / 0.5, 4 * 32 / 2.0):
        measured = rates.step()
        assert measured["tokens_per_second"] == pytest.approx(speed, rel=1e-12)
        assert measured["mfu"] == pytest.approx(speed * flops / (4 * 2e9), rel=1e-12)
        assert 0.05 < measured["memory_gib"] < 64


def configured(*settings: str) -> RunConfig:
    run, _ = parse_config([*TINY, *settings], loop.OPTIONS)
    return run


def test_the_seed_decides_weights_order_and_draws(tmp_path: Path, tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """train.seed reaches all three, and each by the address that another program can calculate."""
    addresses: list[Draws] = []
    forward = Router.forward

    def spy(self: Router, x_TD: Tensor, draws: Draws) -> Any:
        addresses.append(draws)
        return forward(self, x_TD, draws)

    monkeypatch.setattr(Router, "forward", spy)
    with session(RuntimeConfig(device="cpu")) as runtime:
        for seed in (3, (1 << 40) + 3):
            run = configured(f"--train.run_dir={tmp_path}", f"--data.train={tokens}", f"--train.seed={seed}")
            trainer = Trainer(run, runtime)
            weights = store.gather(trainer.engine.model, trainer.mesh.group("pp"))
            for name in ("embed.weight", "layers.1.attention.q_proj.weight"):
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
                normal = rng.normal_run(0, weights[name].numel(), key, torch.device("cpu"))
                torch.testing.assert_close(weights[name].flatten(), normal * run.model.init_std)
            batches = trainer.batches.micro_batches(1)
            digest = hashlib.sha256(f"{seed}/data/samples/0".encode()).digest()
            words = [int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")]
            drawn = np.random.Philox(key=np.array(words, dtype=np.uint64)).random_raw(trainer.batches.samples_per_epoch)
            order = np.argsort(drawn)
            epoch = trainer.batches._samples._epoch
            assert epoch is not None
            assert np.array_equal(epoch.samples_N, order)
            addresses.clear()
            trainer.engine.train_step(batches, 1, 1e-3)
            assert {(draws.seed, draws.step) for draws in addresses} == {(seed, 1)}
            seen = torch.cat([draws.token_T for draws in addresses]).unique()
            assert seen.tolist() == list(range(4 * 32))
            trainer.batches.close()
