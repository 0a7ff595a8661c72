"""torch.compile on the dense parts: the run of one eager process, few graphs, no graph breaks."""

from dataclasses import replace
from typing import Any

import pytest
from common import MODEL, TOLERANCE, Run, compare, reference, run_steps
from helpers import GlooPool

from megagrin.distributed.mesh import ParallelConfig


def compiled_run(run: Run) -> tuple[dict[str, Any], dict[str, int], int]:
    """The run, the reasons of its graph breaks, and the number of its graphs."""
    import torch._dynamo
    import torch._inductor.config
    from torch._dynamo.utils import counters

    torch._inductor.config.compile_threads = 1  # no helper processes: the pool's own may be killed
    torch._dynamo.reset()
    counters.clear()
    result = run_steps(run)
    return result, dict(counters["graph_break"]), counters["stats"]["unique_graphs"]


PARTS = ("attention_core", "expert_mlp", "norms")
COMPILE = {"compile": True}
FULL = COMPILE | {"recompute": "full"}
SELECTIVE = COMPILE | {"recompute": "selective", "recompute_parts": PARTS}
CP2 = ParallelConfig(cp=2)


@pytest.mark.parametrize(
    ("world_size", "run"),
    [
        pytest.param(2, Run(ParallelConfig(ep=2), 2, "fp32", engine=FULL, documents=True), id="ep2-full"),
        pytest.param(1, Run(ParallelConfig(), 4, "fp32", engine=COMPILE), id="one-rank"),
        pytest.param(2, Run(ParallelConfig(), 2, "fp32", engine=SELECTIVE), id="dp2-selective", marks=pytest.mark.long),
        pytest.param(2, Run(CP2, 4, "fp32", engine=FULL, documents=True), id="cp2-full", marks=pytest.mark.long),
        pytest.param(
            2,
            Run(replace(CP2, cp_method="ulysses"), 4, "fp32", engine=COMPILE),
            id="ulysses",
            marks=pytest.mark.long,
        ),
        pytest.param(
            2,
            Run(ParallelConfig(), 4, "fp32", model=replace(MODEL, n_experts=0, top_k=1, n_layers=4), engine=COMPILE),
            id="dense",
        ),
    ],
)
def test_same_run(gloo: GlooPool, world_size: int, run: Run) -> None:
    """Losses, gradients and updates of an eager process; all layers share one graph of each kind of part."""
    for ours, breaks, graphs in gloo.run(world_size, compiled_run, run):
        compare(ours, reference(gloo, run), TOLERANCE["fp32"])
        assert breaks == {}
        kinds = 2 if run.model.is_moe else 3  # attention, norm, dense MLP
        assert kinds <= graphs <= 2 * kinds, "a graph with and one without gradients, at most"
