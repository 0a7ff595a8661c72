"""The learning rate of every step against closed formulas and the schedulers of transformers."""

import itertools
import math
from typing import Any, Literal

import pytest

from megagrin.optim.optimizer import OptimConfig
from megagrin.optim.schedule import learning_rate

Schedule = Literal["cosine", "wsd", "constant"]
SHAPES: tuple[Schedule, ...] = ("cosine", "wsd", "constant")


def rates(steps: int, **settings: Any) -> list[float]:
    config = OptimConfig(**({"lr": 1.0, "min_lr_ratio": 0.0} | settings))
    return [learning_rate(config, step, steps) for step in range(steps)]


@pytest.mark.parametrize(
    ("steps", "settings", "expected"),
    [
        # Warm-up of W steps: the first is 1/W of the peak, not 0; the last is the peak.
        (4, {"schedule": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0]),
        (3, {"schedule": "constant", "warmup_steps": 0}, [1.0, 1.0, 1.0]),
        (3, {"schedule": "constant", "warmup_steps": 2, "min_lr_ratio": 0.5}, [0.5, 1.0, 1.0]),
        # Cosine from the peak to the floor: (1 + cos(π·k/n)) / 2.
        (1, {"schedule": "cosine", "warmup_steps": 0}, [1.0]),
        (2, {"schedule": "cosine", "warmup_steps": 0}, [1.0, 0.0]),
        (3, {"schedule": "cosine", "warmup_steps": 0}, [1.0, 0.5, 0.0]),
        (3, {"schedule": "cosine", "warmup_steps": 1}, [1.0, 0.5, 0.0]),
        (3, {"schedule": "cosine", "warmup_steps": 3}, [1 / 3, 2 / 3, 1.0]),
        (3, {"schedule": "cosine", "warmup_steps": 6}, [1 / 6, 2 / 6, 3 / 6]),
        (4, {"schedule": "cosine", "warmup_steps": 0, "min_lr_ratio": 0.2}, [1.0, 0.8, 0.4, 0.2]),
        (6, {"schedule": "cosine", "warmup_steps": 2}, [0.5, 1.0, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4, 0.0]),
        # WSD over 10 steps with decay 0.2: the last two steps go down, the last one to the floor.
        (10, {"schedule": "wsd", "warmup_steps": 2, "decay_fraction": 0.2}, [0.5, *[1.0] * 7, 0.5, 0.0]),
        (5, {"schedule": "wsd", "warmup_steps": 0, "decay_fraction": 0.4, "min_lr_ratio": 0.5}, [1.0, 1.0, 1.0, 0.75, 0.5]),
        (3, {"schedule": "wsd", "warmup_steps": 0, "decay_fraction": 0.0}, [1.0, 1.0, 1.0]),
        (3, {"schedule": "wsd", "warmup_steps": 1, "decay_fraction": 1.0}, [1.0, 0.5, 0.0]),
        (1, {"schedule": "wsd", "warmup_steps": 0, "decay_fraction": 1.0}, [1.0]),
        (2, {"schedule": "wsd", "warmup_steps": 1, "decay_fraction": 0.1}, [1.0, 0.0]),
        # A decay that would begin within the warm-up begins at its end.
        (8, {"schedule": "wsd", "warmup_steps": 6, "decay_fraction": 0.5}, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0, 0.5, 0.0]),
    ],
)
def test_closed_values(steps: int, settings: dict[str, Any], expected: list[float]) -> None:
    """Short runs by hand."""
    assert rates(steps, **settings) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", SHAPES)
def test_ends_and_jumps(schedule: Schedule) -> None:
    """For all short runs: peak and floor are reached exactly, and no step changes the rate by more than its slope says."""
    for steps, warmup, fraction in itertools.product((1, 2, 3, 8, 40), (0, 1, 2, 7, 39), (0.0, 0.1, 0.5, 1.0)):
        case = (steps, warmup, fraction)
        curve = rates(steps, schedule=schedule, lr=3e-3, min_lr_ratio=0.1, warmup_steps=warmup, decay_fraction=fraction)
        assert min(curve) > 0, case
        assert max(curve) == (3e-3 if warmup <= steps else curve[-1]), case
        rising = 1 / warmup if warmup else 1.0
        falling = math.pi / 2 / max(1, steps - max(1, warmup)) if schedule == "cosine" else 0.0
        if schedule == "wsd" and fraction:
            falling = 1 / max(1, min(math.ceil(fraction * steps), steps - max(1, warmup)))
        for before, after in itertools.pairwise(curve):
            assert -falling * 3e-3 * 0.9 - 1e-12 <= after - before <= rising * 3e-3 + 1e-12, case
        decays = schedule == "cosine" or (schedule == "wsd" and fraction > 0)
        if decays and max(1, warmup) < steps:
            assert curve[-1] == pytest.approx(3e-4, rel=1e-15), case


@pytest.mark.parametrize(("steps", "warmup", "decay"), [(20, 5, 6), (7, 1, 2), (100, 30, 50)])
def test_curve_of_transformers(steps: int, warmup: int, decay: int) -> None:
    """transformers gives its first step the rate 0: its curve is ours one step later."""
    optimization = pytest.importorskip("transformers.optimization")
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cosine = optimization.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr_rate=0.1)
    # Its warm-up begins at the floor, ours at 0: one curve where the floor is 0.
    wsd = optimization.get_wsd_schedule(optimizer, warmup, decay, num_training_steps=steps, decay_type="linear")
    constant = optimization.get_constant_schedule_with_warmup(optimizer, warmup)
    for schedule, theirs, floor in (("cosine", cosine, 0.1), ("wsd", wsd, 0.0), ("constant", constant, 0.1)):
        ours = rates(steps, schedule=schedule, warmup_steps=warmup, decay_fraction=decay / steps, min_lr_ratio=floor)
        assert ours == pytest.approx([theirs.lr_lambdas[0](step + 1) for step in range(steps)], abs=1e-12), schedule
