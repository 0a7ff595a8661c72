"""Every ZeRO stage of DeepSpeed with every mode and part of recomputation: what is computed again finds its weights gathered."""

from typing import Any

import pytest
from common import Run
from helpers import GlooPool
from parallel.combinations import MODES
from parallel.test_options import recompute
from zero_runs import assert_same

from megagrin.distributed.mesh import ParallelConfig

pytestmark = pytest.mark.slow


def case(stage: int, mode: str) -> Any:
    """CI has the stage whose weights are gone when backward wants them."""
    run = Run(ParallelConfig(ep=2), 1, "fp32", 2, documents=True, engine={"zero": stage} | recompute(mode))
    return pytest.param(2, run, id=f"zero{stage}-{mode}", marks=() if stage == 3 and mode != "budget" else pytest.mark.long)


@pytest.mark.parametrize(("world_size", "run"), [case(stage, mode) for stage in (1, 2, 3) for mode in MODES])
def test_recompute(gloo: GlooPool, world_size: int, run: Run) -> None:
    """The run of one native process that keeps everything."""
    assert_same(gloo, world_size, run)
