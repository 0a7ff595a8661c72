"""Draws of the router that differ between a layout and one process, and how close to an edge they were.

A draw inverts a cumulative distribution at a random point; rounding moves the distribution's steps and the mask's edge, never the
point. A draw whose point lies next to a step, or whose mask has an expert next to its edge, is a near-tie.

Shape suffixes: T tokens of a step, K experts per token, E experts.
"""

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import MODEL, OPTIM, ROUTER, SEQ, SEQUENCES, Run, build_engine, micro_batches
from torch import Tensor

from megagrin.data.loader import DataConfig
from megagrin.distributed.mesh import ParallelConfig
from megagrin.engines.base import EngineConfig
from megagrin.moe import router
from megagrin.optim.schedule import learning_rate
from megagrin.parallel.expert import moe_layers
from megagrin.training import rules
from megagrin.training.run_config import RunConfig, TrainConfig

SHAPE = replace(MODEL, n_experts=6, n_kv_heads=4)
MASK = 0.01  # a distribution that moves by more has another mask: an expert more or less has more than this
ONE_STEP = 2.0**-30  # of the fixed point that a draw inverts


def random_layouts(
    count: int, seed: int, steps: int, mask_eps: float, dtype: str, adam_eps: float = OPTIM.eps
) -> list[tuple[int, Run]]:
    """Different valid layouts of two and four ranks, with ZeRO stages and accumulation."""
    pick = random.Random(seed)
    runs: list[tuple[int, Run]] = []
    while len(runs) < count:
        ranks, (tp, pp, cp, ep, etp, copies) = pick.choice([2, 4]), [pick.choice([1, 1, 2, 4]) for _ in range(6)]
        parallel = ParallelConfig(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, dp_replicate=copies)
        run = Run(parallel, pick.choice([1, 2, 4]), dtype, steps, SHAPE, replace(ROUTER, mask_eps=mask_eps), documents=True)
        run = replace(run, engine={"zero": pick.choice([1, 2, 3])}, optim=replace(OPTIM, eps=adam_eps))
        train = TrainConfig(seq_len=SEQ, global_batch_size=SEQUENCES, micro_batch_size=run.micro)
        engine = EngineConfig(dtype=dtype, **run.engine)  # type: ignore[arg-type]
        config = RunConfig(train, run.model, run.router, run.balance, DataConfig("tokens"), run.optim, run.parallel, engine)
        if not rules.violations(config, ranks) and (ranks, run) not in runs:
            runs.append((ranks, run))
    return runs


@dataclass
class Drawn:
    """What a run drew; every rank has the tokens that it routed.

    Attributes:
        losses: of each step.
        experts: by step, layer and token, the experts in the order of the draws.
        edges: by step, layer and token, the distance of each draw to its nearest edge, as a share of the distribution.
        cumulatives: by step, layer and token, the cumulative distribution that each draw inverts.
    """

    losses: list[float]
    experts: dict[tuple[int, int, int], list[int]]
    edges: dict[tuple[int, int, int], list[float]]
    cumulatives: dict[tuple[int, int, int], list[list[float]]]


def _edge_of_draw(p_TE: Tensor, word_T: Tensor) -> Tensor:
    cumulative_TE = (p_TE.double() / ONE_STEP).round().to(torch.int64).cumsum(-1)
    total_T1 = cumulative_TE[:, -1:]
    point_T1 = total_T1 * word_T.unsqueeze(1) >> 32
    return ((cumulative_TE[:, :-1] - point_T1).abs() / total_T1).amin(-1)


def _edge_of_mask(z_TE: Tensor, eps: float) -> Tensor:
    best_T1 = z_TE.amax(-1, keepdim=True)
    ratio_TE = (best_T1 - z_TE) / torch.maximum(z_TE.abs(), best_T1)
    return (ratio_TE - 2 * eps).abs().nan_to_num(torch.inf).amin(-1).double()


def drawn(run: Run) -> Drawn:
    """Train and note every draw of this rank."""
    engine = build_engine(run)
    result = Drawn([], {}, {}, {})
    rounds: list[Tensor] = []
    cumulatives: list[Tensor] = []
    rule, sample = router.dropped_by_code, router.sample

    def noted_rule(z_TE: Tensor, eps: float) -> Tensor:
        rounds.append(_edge_of_mask(z_TE, eps))
        return rule(z_TE, eps)

    def noted_sample(p_TE: Tensor, word_T: Tensor) -> Tensor:
        rounds[-1] = torch.minimum(rounds[-1], _edge_of_draw(p_TE, word_T))
        cumulatives.append(p_TE.double().cumsum(-1))
        return sample(p_TE, word_T)

    def note(module: Any, arguments: Any, output: Any) -> None:
        draws, edges_TK, cumulative_TKE = arguments[1], torch.stack(rounds, 1), torch.stack(cumulatives, 1)
        rounds.clear()
        cumulatives.clear()
        columns = (draws.token_T, output[1].expert_TK, edges_TK, cumulative_TKE)
        for token, experts, edges, cumulative in zip(*(column.tolist() for column in columns), strict=True):
            place = (draws.step, module.layer, token)
            result.experts[place], result.edges[place], result.cumulatives[place] = experts, edges, cumulative

    for layer in moe_layers(engine.model):
        layer.router.register_forward_hook(note)
    router._MASK_RULES["code"], router.sample = noted_rule, noted_sample
    try:
        for step in range(run.steps):
            lr = learning_rate(run.optim, step, run.steps)
            result.losses.append(engine.train_step(micro_batches(run, step, engine.mesh), step, lr).loss)
    finally:
        router._MASK_RULES["code"], router.sample = rule, sample
    return result


@dataclass(frozen=True)
class Flips:
    """How a layout's draws differ from one process's.

    Attributes:
        draws: compared.
        flipped: of them, differing; draws behind a flip follow it, as the weights are others then.
        loss: largest relative difference of a step's loss.
        edge: the largest distance to an edge, in one process, of the draws that flipped first; 0 without flips.
        expected: flips that other random words would have shown on average before the first one: the share of the points that
            fall to another expert where the layout's steps of the distribution lie elsewhere. It has no luck in it, and tells
            apart what a count of rare flips cannot.
        compared: draws that `expected` is a sum over.
        masked: of these draws, those with another set of experts to choose from, which `expected` leaves out.
    """

    draws: int
    flipped: int
    loss: float
    edge: float
    expected: float
    compared: int
    masked: int


def compare_draws(ranks: list[Drawn], alone: Drawn) -> Flips:
    """All ranks of a layout against one process; what one rank routed, no other may have routed otherwise."""
    experts: dict[tuple[int, int, int], list[int]] = {}
    cumulatives: dict[tuple[int, int, int], list[list[float]]] = {}
    for rank in ranks:
        assert all(experts.get(place, drawn_) == drawn_ for place, drawn_ in rank.experts.items())
        experts |= rank.experts
        cumulatives |= rank.cumulatives
    assert experts.keys() == alone.experts.keys(), "a token was not routed"
    flipped, compared, masked, expected = 0, 0, 0, 0.0
    first: dict[tuple[int, int], list[float]] = {}
    for place in sorted(alone.experts):
        pairs = list(zip(experts[place], alone.experts[place], strict=True))
        differing = [draw for draw, (ours, theirs) in enumerate(pairs) if ours != theirs]
        flipped += len(differing)
        if not first:
            for ours_E, theirs_E in zip(cumulatives[place], alone.cumulatives[place], strict=True):
                moved = sum(abs(ours - theirs) for ours, theirs in zip(ours_E, theirs_E, strict=True))
                compared, masked, expected = compared + 1, masked + (moved >= MASK), expected + (moved if moved < MASK else 0.0)
        if differing:
            first.setdefault((place[0], place[1]), []).append(alone.edges[place][differing[0]])
    # Only in the first layer of the first step with a flip has nothing but rounding come before it.
    edge = max(first[min(first)]) if first else 0.0
    loss = max(abs(ours / theirs - 1) for ours, theirs in zip(ranks[0].losses, alone.losses, strict=True))
    draws = sum(len(drawn_) for drawn_ in alone.experts.values())
    return Flips(draws, flipped, loss, edge, expected, compared, masked)
