"""Every option that a row or column of README's table names, with every other: what test_matrix and test_pairs leave out.

`parallel/combinations.py` says which cases a tick needs. Three steps in fp64 against one process; CI has the native engine's
ZeRO-3 with every way to recompute, `make test-all` all.
"""

from dataclasses import replace
from typing import Any

import pytest
from common import MODEL, OPTIM, TOLERANCE, Run, assert_same_run, compare, reference
from helpers import GlooPool
from parallel.combinations import MODES
from parallel.test_compile import compiled_run

from megagrin.distributed.mesh import ParallelConfig

DEEP = replace(MODEL, n_layers=4)
DENSE = replace(MODEL, n_experts=0, top_k=1)
MUON = replace(OPTIM, kind="muon")
CHUNKS = {"ep": 2, "ep_chunks": 2}
INTERLEAVED = {"pp": 2, "pp_schedule": "interleaved_1f1b", "pp_stages_per_rank": 2}
ZERO_BUBBLE = {"pp": 2, "pp_schedule": "zero_bubble", "pp_stages_per_rank": 2}


def recompute(mode: str) -> dict[str, Any]:
    """The settings of one of MODES; selective names no parts, as most recipes do."""
    if mode in ("full", "selective", "budget"):
        return {"recompute": mode} | ({"recompute_budget_gib": 1.0} if mode == "budget" else {})
    return {"recompute": "selective", "recompute_parts": (mode,)}


def case(name: str, ranks: int, degrees: dict[str, Any], micro: int, marks: Any = pytest.mark.long, **fields: Any) -> Any:
    """A run with documents."""
    return pytest.param(ranks, Run(ParallelConfig(**degrees), micro, documents=True, **fields), id=name, marks=marks)


RECOMPUTED = [
    case(f"zero{zero}-{mode}", 2, CHUNKS, 2, () if zero == 3 else pytest.mark.long, engine={"zero": zero} | recompute(mode))
    for zero in (1, 2, 3)
    for mode in MODES
]
for index, mode in enumerate(MODES):
    method = ("all_gather", "ulysses")[index % 2]
    RECOMPUTED += [
        case(f"tp2-etp2-{mode}", 2, {"tp": 2, "etp": 2}, 4, engine=recompute(mode)),
        case(f"cp2-hybrid-{mode}", 4, {"cp": 2, "cp_method": method, "dp_replicate": 2}, 2, engine=recompute(mode)),
        case(f"muon-pp2-ep2-{mode}", 4, {"pp": 2, "ep": 2}, 2, optim=MUON, engine=recompute(mode)),
    ]
    if mode not in ("expert_mlp", "router"):
        RECOMPUTED.append(case(f"dense-tp2-{mode}", 2, {"tp": 2}, 4, model=DENSE, engine=recompute(mode)))
OTHERS = [
    case("tp2-zero-bubble", 4, ZERO_BUBBLE | {"tp": 2}, 2, model=DEEP),
    case("cp2-zero-bubble", 4, ZERO_BUBBLE | {"cp": 2}, 2, model=DEEP),
    case("ulysses-interleaved", 4, INTERLEAVED | {"cp": 2, "cp_method": "ulysses"}, 2, model=DEEP),
    case("etp2-interleaved", 4, INTERLEAVED | {"etp": 2}, 2, model=DEEP),
    case("etp2-zero-bubble", 4, ZERO_BUBBLE | {"etp": 2}, 2, model=DEEP),
    case("hybrid-interleaved", 4, INTERLEAVED | {"dp_replicate": 2}, 2, model=DEEP),
    case("hybrid-zero-bubble", 4, ZERO_BUBBLE | {"dp_replicate": 2}, 2, model=DEEP),
    case("chunks-tp2", 2, CHUNKS | {"tp": 2}, 4),
    case("chunks-pp2", 4, CHUNKS | {"pp": 2}, 2),
    case("chunks-cp2", 2, CHUNKS | {"cp": 2}, 4),
    case("chunks-ulysses", 2, CHUNKS | {"cp": 2, "cp_method": "ulysses"}, 4),
    case("chunks-etp2", 4, CHUNKS | {"etp": 2}, 2),
    case("chunks-hybrid", 4, CHUNKS | {"dp_replicate": 2}, 2),
    case("chunks-muon", 2, CHUNKS, 2, optim=MUON),
    case("hybrid-etp2", 8, {"etp": 2, "dp_replicate": 2}, 1),
    case("etp2-ulysses", 2, {"etp": 2, "cp": 2, "cp_method": "ulysses"}, 4),
    case("muon-tp2-etp2", 2, {"tp": 2, "etp": 2}, 4, optim=MUON),
    case("muon-hybrid", 4, {"dp_replicate": 2}, 2, optim=MUON),
    case("muon-interleaved", 2, INTERLEAVED, 2, optim=MUON, model=DEEP),
    case("muon-zero-bubble", 2, ZERO_BUBBLE, 2, optim=MUON, model=DEEP),
    case("dense-interleaved", 2, INTERLEAVED, 2, model=replace(DENSE, n_layers=4)),
    *(case(f"zero{zero}-ulysses", 4, {"cp": 2, "cp_method": "ulysses"}, 2, engine={"zero": zero}) for zero in (1, 2)),
]


@pytest.mark.parametrize(("world_size", "run"), [*RECOMPUTED, *OTHERS])
def test_same_run(gloo: GlooPool, world_size: int, run: Run) -> None:
    """Experts drawn, losses, every gradient, update and clip norm."""
    assert_same_run(gloo, world_size, run)


@pytest.mark.parametrize(("world_size", "run"), [case("chunks", 2, CHUNKS, 4, dtype="fp32", engine={"compile": True})])
def test_same_compiled_run(gloo: GlooPool, world_size: int, run: Run) -> None:
    """The same with compiled dense parts."""
    for ours, breaks, _ in gloo.run(world_size, compiled_run, run):
        compare(ours, reference(gloo, run), TOLERANCE["fp32"])
        assert breaks == {}
