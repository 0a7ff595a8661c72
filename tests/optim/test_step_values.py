"""Gradient norm, clipping and AdamW's step on one process, against formulas and torch's own clipping."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from megagrin.optim.norm import clip_gradients, gradient_norm
from megagrin.optim.optimizer import OptimConfig, build_optimizer


def parameters(*gradients: list[float] | None, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    made = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros(1 if gradient is None else len(gradient), dtype=dtype))
        parameter.grad = None if gradient is None else torch.tensor(gradient, dtype=dtype)
        made.append(parameter)
    return made


def test_norm_by_hand() -> None:
    norm = gradient_norm(parameters([3.0, -4.0], None, [12.0]))
    assert norm.dtype == torch.float64
    assert norm.shape == ()
    assert norm.item() == pytest.approx(13, rel=1e-15)


def test_no_gradient_at_all_has_norm_zero() -> None:
    for made in ([], parameters(None, None)):
        norm = gradient_norm(made)
        assert norm.dtype == torch.float64
        assert norm.item() == 0


def test_squares_are_summed_in_fp64() -> None:
    """(2^12)² + 1 is no fp32 number: summed in fp32 the small gradient would be lost."""
    norm = gradient_norm(parameters([2.0**12], [1.0], dtype=torch.float32))
    assert norm.item() == math.sqrt(2.0**24 + 1)


@pytest.mark.parametrize("max_norm", [0.5, 12.9, 13.0, 13.1, 100.0])
def test_clipping_is_torchs(max_norm: float) -> None:
    ours, theirs = (parameters([3.0, -4.0], None, [12.0]) for _ in range(2))
    clip_gradients(ours, gradient_norm(ours), max_norm)
    total = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert total.item() == pytest.approx(13, rel=1e-15)
    for mine, other in zip(ours, theirs, strict=True):
        if other.grad is None:
            assert mine.grad is None
        else:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-15, atol=0)


def test_gradients_below_the_limit_stay_as_they_are() -> None:
    made = parameters([3.0, -4.0], dtype=torch.float32)
    clip_gradients(made, gradient_norm(made), 5.1)
    assert made[0].grad.tolist() == [3.0, -4.0]
    clip_gradients(made, gradient_norm(made), 1.0)
    assert made[0].grad.dtype == torch.float32
    assert made[0].grad.tolist() == pytest.approx([0.6, -0.8], rel=1e-6)


def test_two_steps_of_adamw_are_the_papers() -> None:
    """Loshchilov and Hutter, algorithm 2: bias-corrected moments, ε outside the root, decay by lr·λ."""
    config = OptimConfig(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5, fused_adam="torch")
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
    optimizer = build_optimizer(model, config, torch.float32)
    expected, first, second = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for step, gradient in enumerate(([0.3, -1.0], [-0.2, 4.0]), start=1):
        model.weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        for i, g in enumerate(gradient):
            first[i] = 0.8 * first[i] + 0.2 * g
            second[i] = 0.9 * second[i] + 0.1 * g * g
            direction = (first[i] / (1 - 0.8**step)) / (math.sqrt(second[i] / (1 - 0.9**step)) + 1e-3)
            expected[i] = expected[i] * (1 - 0.1 * 0.5) - 0.1 * direction
        assert model.weight[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_borders_of_the_settings() -> None:
    config = OptimConfig()
    assert config.violations() == []
    unit, half_open, whole = "must lie in [0, 1]", "must lie in [0, 1)", "must not be negative"
    rules = [
        ("lr", (1e-12,), (0.0, -1.0), "must be positive"),
        ("eps", (1e-30,), (0.0, -1.0), "must be positive"),
        ("min_lr_ratio", (0.0, 1.0), (-1e-9, 1.1), unit),
        ("decay_fraction", (0.0, 1.0), (-1e-9, 1.1), unit),
        ("beta1", (0.0, 0.999), (-1e-9, 1.0), half_open),
        ("beta2", (0.0, 0.999), (-1e-9, 1.0), half_open),
        ("muon_momentum", (0.0, 0.999), (-1e-9, 1.0), half_open),
        ("warmup_steps", (0,), (-1,), whole),
        ("weight_decay", (0.0,), (-1e-9,), whole),
        ("clip_norm", (0.0,), (-1e-9,), whole),
    ]
    for name, good, bad, rule in rules:
        for value in good:
            assert replace(config, **{name: value}).violations() == [], (name, value)
        for value in bad:
            assert any(f"optim.{name}: {value} {rule}" in line for line in replace(config, **{name: value}).violations())
