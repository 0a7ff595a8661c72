"""The learning rate outside the run's steps, by the definition of its schedules."""

import pytest

from megagrin.optim.optimizer import OptimConfig
from megagrin.optim.schedule import learning_rate


@pytest.mark.parametrize(("schedule", "final"), [("cosine", 2.5e-4), ("wsd", 2.5e-4), ("constant", 1e-3)])
def test_steps_after_the_last_one_have_its_rate(schedule: str, final: float) -> None:
    config = OptimConfig(lr=1e-3, min_lr_ratio=0.25, warmup_steps=2, schedule=schedule, decay_fraction=0.5)  # type: ignore[arg-type]
    for step in (9, 10, 11, 13, 17, 1000):
        assert learning_rate(config, step, 10) == pytest.approx(final, rel=1e-12)
