"""What the ranks of a run say beside the run's own lines."""

import warnings

from common import Run, run_steps
from helpers import GlooPool

from megagrin.distributed.mesh import ParallelConfig


def warned(run: Run) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_steps(run)
    return [f"{warning.category.__name__}: {warning.message}" for warning in caught]


def test_ranks_call_nothing_deprecated(gloo: GlooPool) -> None:
    """A warning for each rank and collective would bury the run's own lines."""
    run = Run(ParallelConfig(tp=2, cp=2, ep=2), dtype="fp32", steps=1)
    for lines in gloo.run(4, warned, run):
        assert [line for line in lines if "deprecated" in line and "torch.distributed" in line] == []
