"""Layouts and shapes drawn at random: valid ones give the run of one process, invalid ones an error that names what is wrong."""

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
from common import BALANCE, MODEL, OPTIM, ROUTER, SEQ, SEQUENCES, Run, assert_same_run
from helpers import GlooPool
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megagrin.cli import main
from megagrin.data.loader import DataConfig
from megagrin.distributed.mesh import ParallelConfig
from megagrin.engines.base import EngineConfig
from megagrin.training import rules
from megagrin.training.run_config import RunConfig, TrainConfig

EXAMPLES, MANY_EXAMPLES = 8, 40
# derandomize: the same examples in every run, so that a failure is one for everybody; no shrinking, which would take minutes.
FIXED = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "phases": (Phase.generate,),
    "suppress_health_check": list(HealthCheck),
}


def as_config(run: Run) -> RunConfig:
    """The run as a user would configure it."""
    train = TrainConfig(seq_len=SEQ, global_batch_size=SEQUENCES, micro_batch_size=run.micro)
    engine = EngineConfig(dtype=run.dtype, **run.engine)  # type: ignore[arg-type]
    data = DataConfig(train="tokens")
    return RunConfig(train, run.model, run.router, run.balance, data, run.optim, run.parallel, engine)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _pick(draw: Any, values: list[int]) -> int:
    return draw(st.sampled_from(values))


@st.composite
def valid_runs(draw: Any) -> tuple[int, Run]:
    """A number of ranks from 2 to 8 and a run that fits it, by rules written down here a second time."""
    tp, cp, pp = (_pick(draw, [1, 2, 4]) for _ in range(3))
    while tp * cp * pp > 8:
        tp, cp, pp = tp, max(1, cp // 2), pp if cp > 1 else pp // 2
    dp = _pick(draw, [degree for degree in (1, 2, 4, 8) if 2 <= degree * tp * cp * pp <= 8] or [1])
    n_experts, heads = _pick(draw, [4, 8]), _pick(draw, [4, 8])
    stage_ranks = dp * cp * tp
    ep = _pick(draw, _divisors(math.gcd(stage_ranks, n_experts)))
    etp = _pick(draw, _divisors(stage_ranks // ep)[:2])
    replicate = _pick(draw, _divisors(math.gcd(dp, stage_ranks // (ep * etp))))
    model = replace(
        MODEL,
        vocab_size=_pick(draw, [3, 37, 67]),
        n_layers=_pick(draw, [pp, pp + 1]),
        n_heads=heads,
        n_kv_heads=4,
        head_dim=_pick(draw, [4, 6]),
        n_experts=n_experts,
        top_k=_pick(draw, [1, 2, 4]),
        d_ff=_pick(draw, [8, 24]),
        window=_pick(draw, [3, 9, 64]),
    )
    micros = [size for size in _divisors(SEQUENCES // dp) if SEQUENCES // dp // size >= pp]
    engine = {"recompute": draw(st.sampled_from(["none", "full", "selective"])), "zero": _pick(draw, [1, 2, 3])}
    parallel = ParallelConfig(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, dp_replicate=replicate)
    if cp > 1 and 4 % (tp * cp) == 0 and draw(st.booleans()):
        parallel = replace(parallel, cp_method="ulysses")
    if pp > 1 and engine["recompute"] != "full" and draw(st.booleans()):
        parallel = replace(parallel, pp_schedule="zero_bubble")
    documents = draw(st.booleans())
    run = Run(parallel, _pick(draw, micros), "fp64", 2, model, ROUTER, BALANCE, OPTIM, documents, engine)
    return stage_ranks * pp, run


def _check_valid(gloo: GlooPool, case: tuple[int, Run]) -> None:
    world_size, run = case
    assert rules.violations(as_config(run), world_size) == [], "a valid layout was refused"
    assert_same_run(gloo, world_size, run)


def test_random_layouts(gloo: GlooPool) -> None:
    """A few of them, with sampled routing, against one process."""
    settings(max_examples=EXAMPLES, **FIXED)(given(valid_runs())(lambda case: _check_valid(gloo, case)))()


@pytest.mark.slow
@pytest.mark.long
def test_many_random_layouts(gloo: GlooPool) -> None:
    """More of them."""
    settings(max_examples=MANY_EXAMPLES, **FIXED)(given(valid_runs())(lambda case: _check_valid(gloo, case)))()


DEGREES = st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 8])


@settings(max_examples=300, **FIXED)
@given(st.integers(1, 8), st.builds(ParallelConfig, *[DEGREES] * 6), st.sampled_from([0, 6, 8]), st.sampled_from([1, 3]))
def test_any_layout_is_accepted_or_refused_by_name(world_size: int, parallel: ParallelConfig, n_experts: int, micro: int) -> None:
    """Checking never raises; a layout that cannot be built has a violation, and every violation starts with a field's name."""
    model = replace(MODEL, n_experts=n_experts, top_k=min(2, max(1, n_experts)))
    config = as_config(Run(parallel, micro, model=model))
    broken = rules.violations(config, world_size)
    names = {f"{section}.{name}" for section, fields in asdict(config).items() for name in fields}
    for line in broken:
        field, _, rule = line.partition(": ")
        assert set(field.split(" × ")) <= names, line
        assert any(character.isdigit() for character in rule), f"{line}: a rule says which value breaks it"
    degrees = [parallel.tp, parallel.pp, parallel.cp, parallel.ep, parallel.etp, parallel.dp_replicate]
    fits = min(degrees) >= 1 and world_size % (parallel.pp * parallel.cp * parallel.tp) == 0
    fits = fits and world_size % (parallel.pp * parallel.ep * parallel.etp) == 0 and n_experts % max(1, parallel.ep) == 0
    assert fits or broken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parallel.tp=3"], "parallel.tp: 3 must divide"),
        (["--parallel.pp=2", "--parallel.cp=3"], "parallel.pp × parallel.cp: 6 must divide the number of ranks (4)"),
        (["--parallel.ep=8"], "parallel.ep: 8 must divide the number of ranks (4)"),
        (["--parallel.tp=0"], "parallel.tp: 0 must be at least 1"),
        (["--parallel.pp=four"], "parallel.pp"),
    ],
)
def test_commands_refuse_in_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`megagrin train` ends with status 2 and says field, value and rule, without a traceback."""
    assert main(["train", "--data.train=none", "--dry_run", "--world_size=4", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
