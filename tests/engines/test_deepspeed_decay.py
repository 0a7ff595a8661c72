"""What DeepSpeed decays, by name."""

from dataclasses import replace

import pytest
from common import MODEL, Run, expected_decay
from helpers import GlooPool
from zero_runs import deepspeed_engine

from megagrin.distributed.mesh import ParallelConfig

pytestmark = pytest.mark.slow


def decay_by_name(run: Run) -> dict[str, float]:
    """Weight decay of every parameter in the groups that DeepSpeed was given."""
    with deepspeed_engine(run) as engine:
        named = dict(engine.model.named_parameters())
        names = {parameter: name for name, parameter in named.items()}
        return {names[p]: group["weight_decay"] for group in engine.parameter_groups(named) for p in group["params"]}


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("moe", [True, False])
def test_what_decays(gloo: GlooPool, moe: bool, zero: int) -> None:
    """By name: matrices, also where ZeRO-3 leaves empty tensors in their places; no bias, no norm."""
    model = MODEL if moe else replace(MODEL, n_experts=0, top_k=1)
    run = Run(
        ParallelConfig(), 1, dtype="fp32", model=model, optim=replace(Run().optim, weight_decay=0.25), engine={"zero": zero}
    )
    assert gloo.run(1, decay_by_name, run)[0] == {name: 0.25 if d else 0.0 for name, d in expected_decay(moe).items()}
