"""Every dimension alone, all pairs, triples and folded layouts: 20 steps of sampled routing against one process.

Sampled experts, losses, clip norms, every gradient of every step and the final weights, with balance loss and clipping at work,
documents, a sliding window and a vocabulary that divides by nothing. The subset marked fast runs in `make test`.
"""

from dataclasses import replace
from typing import Any

import pytest
from common import MODEL, Run, assert_same_run
from helpers import GlooPool

from megagrin.distributed.mesh import ParallelConfig

# Key-value heads for tp 4, layers that do not divide by the stages.
SHAPE = replace(MODEL, n_layers=3, n_kv_heads=4)

# name: (ranks, degrees, sequences a micro-batch)
LAYOUTS: dict[str, tuple[int, dict[str, int | str], int]] = {
    "accumulation": (1, {}, 2),
    "dp2": (2, {}, 4),
    "dp8": (8, {}, 1),
    "dp4-hybrid2": (4, {"dp_replicate": 2}, 1),
    "tp2": (2, {"tp": 2}, 4),
    "tp4": (4, {"tp": 4}, 8),
    "cp2": (2, {"cp": 2}, 8),
    "cp4": (4, {"cp": 4}, 4),
    "cp2-ulysses": (2, {"cp": 2, "cp_method": "ulysses"}, 4),
    "cp4-ulysses": (4, {"cp": 4, "cp_method": "ulysses"}, 8),
    "pp2": (2, {"pp": 2}, 2),
    "pp4": (4, {"pp": 4}, 1),
    "pp2-interleaved": (2, {"pp": 2, "pp_schedule": "interleaved_1f1b", "pp_stages_per_rank": 2}, 2),
    "pp2-zero-bubble": (2, {"pp": 2, "pp_schedule": "zero_bubble", "pp_stages_per_rank": 2}, 2),
    "ep2": (2, {"ep": 2}, 4),
    "ep8": (8, {"ep": 8}, 1),
    "etp2": (2, {"etp": 2}, 4),
    "etp4": (4, {"etp": 4}, 2),
    # pairs
    "tp2-dp2": (4, {"tp": 2}, 2),
    "tp4-dp2": (8, {"tp": 4}, 4),
    "tp2-cp2": (4, {"tp": 2, "cp": 2}, 4),
    "tp2-cp2-ulysses": (4, {"tp": 2, "cp": 2, "cp_method": "ulysses"}, 4),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}, 2),
    "tp2-ep2": (2, {"tp": 2, "ep": 2}, 8),
    "tp2-etp2": (2, {"tp": 2, "etp": 2}, 8),
    "cp2-dp2": (4, {"cp": 2}, 2),
    "cp2-pp2": (4, {"cp": 2, "pp": 2}, 4),
    "cp2-ep2": (2, {"cp": 2, "ep": 2}, 4),
    "cp2-etp2": (2, {"cp": 2, "etp": 2}, 4),
    "pp2-dp2": (4, {"pp": 2}, 2),
    "pp4-dp2": (8, {"pp": 4}, 1),
    "pp2-ep2": (4, {"pp": 2, "ep": 2}, 2),
    "pp2-etp2": (4, {"pp": 2, "etp": 2}, 2),
    "pp2-ep2-zero-bubble": (4, {"pp": 2, "ep": 2, "pp_schedule": "zero_bubble"}, 2),
    "ep2-dp2": (4, {"ep": 2}, 2),
    "ep4-dp2": (8, {"ep": 4}, 1),
    "ep2-etp2": (4, {"ep": 2, "etp": 2}, 2),
    "etp2-dp2": (4, {"etp": 2}, 2),
    "ep2-hybrid2": (4, {"ep": 2, "dp_replicate": 2}, 2),
    "tp2-hybrid2": (4, {"tp": 2, "dp_replicate": 2}, 4),
    # triples and folded ones: the experts' axes lie across the dense ones
    "tp2-pp2-dp2": (8, {"tp": 2, "pp": 2}, 2),
    "tp2-cp2-dp2": (8, {"tp": 2, "cp": 2}, 4),
    "tp2-cp2-pp2": (8, {"tp": 2, "cp": 2, "pp": 2}, 4),
    "tp2-dp2-ep4": (4, {"tp": 2, "ep": 4}, 4),
    "tp2-dp4-ep4": (8, {"tp": 2, "ep": 4}, 1),
    "tp4-dp2-ep2-etp2": (8, {"tp": 4, "ep": 2, "etp": 2}, 4),
    "cp2-dp2-ep4": (4, {"cp": 2, "ep": 4}, 4),
    "tp2-cp2-ep4": (4, {"tp": 2, "cp": 2, "ep": 4}, 8),
    "tp2-cp2-dp2-ep2-etp2": (8, {"tp": 2, "cp": 2, "ep": 2, "etp": 2}, 4),
    "pp2-dp2-ep2-hybrid": (8, {"pp": 2, "ep": 2, "dp_replicate": 2}, 1),
    "tp2-pp2-dp2-ep4": (8, {"tp": 2, "pp": 2, "ep": 4}, 2),
    "pp2-ep2-etp2": (8, {"pp": 2, "ep": 2, "etp": 2}, 1),
    "tp2-pp2-ep2-interleaved": (
        8,
        {"tp": 2, "pp": 2, "ep": 2, "pp_schedule": "interleaved_1f1b", "pp_stages_per_rank": 2},
        2,
    ),
    "cp2-pp2-dp2-etp2": (8, {"cp": 2, "pp": 2, "etp": 2}, 2),
}
FAST = ("tp2", "cp2-ulysses", "pp2-zero-bubble", "tp2-ep2", "ep2-etp2", "tp2-cp2-pp2", "tp2-pp2-dp2-ep4", "tp2-cp2-dp2-ep2-etp2")


def run_of(name: str, dtype: str, steps: int) -> tuple[int, Run]:
    """Ranks and run of a layout."""
    ranks, degrees, micro = LAYOUTS[name]
    return ranks, Run(ParallelConfig(**degrees), micro, dtype, steps, SHAPE, documents=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FAST)
def test_layout(gloo: GlooPool, name: str) -> None:
    """Three steps in fp64."""
    assert_same_run(gloo, *run_of(name, "fp64", 3))


# Eight ranks on two cores are slow, and four take seconds: what CI leaves out, `make test-all` has.
SMALL = [name for name, (ranks, _, _) in LAYOUTS.items() if ranks < 8]
FOUR = ("pp4", "cp4-ulysses", "tp2-cp2", "tp2-pp2", "cp2-pp2", "pp2-ep2-zero-bubble", "etp2-dp2", "ep2-hybrid2", "tp2-dp2-ep4")


def _small(name: str) -> Any:
    return pytest.param(name, marks=() if LAYOUTS[name][0] < 4 or name in FOUR else pytest.mark.long)


@pytest.mark.slow
@pytest.mark.parametrize("name", [_small(name) for name in SMALL if name not in FAST])
def test_small_layout(gloo: GlooPool, name: str) -> None:
    """Three steps in fp64 of those on up to four ranks that `make test` leaves out."""
    assert_same_run(gloo, *run_of(name, "fp64", 3))


def _left_to_test_all(name: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if name in ("pp2-zero-bubble", "tp2-ep2", "ep2-etp2") else (pytest.mark.long,)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.long), "fp64"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=_left_to_test_all(name)) for name in LAYOUTS])
def test_layout_over_20_steps(gloo: GlooPool, name: str, dtype: str) -> None:
    """The claim of the project: the same recipe is the same run on every layout."""
    assert_same_run(gloo, *run_of(name, dtype, 20))


def test_there_are_enough_layouts() -> None:
    """Different ones."""
    assert len({repr(layout) for layout in LAYOUTS.values()}) == len(LAYOUTS) >= 40
