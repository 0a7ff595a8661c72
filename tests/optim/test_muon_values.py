"""Muon's whole step against the published recipe written out in numpy: no line is shared with torch or with our own."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from megagrin.optim.muon import Muon, _bounded, is_matrix, orthogonalize
from megagrin.optim.optimizer import OptimConfig, build_optimizer

Matrix = npt.NDArray[np.float64]


def newton_schulz(u: Matrix) -> Matrix:
    """Keller Jordan's five quintic steps: X ← aX + (bA + cA²)X with A = X·Xᵀ, from X = U/‖U‖_F; wide matrices."""
    if u.shape[0] > u.shape[1]:
        return newton_schulz(u.T).T
    x = u / math.sqrt(float((u * u).sum()))
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 7)])
def test_orthogonalized_matrices_are_numpys(shape: tuple[int, int]) -> None:
    stack = np.random.default_rng(4).standard_normal((3, *shape))
    ours = orthogonalize(torch.from_numpy(stack)).numpy()
    for mine, u in zip(ours, stack, strict=True):
        np.testing.assert_allclose(mine, newton_schulz(u), rtol=0, atol=1e-12)
        # What the recipe promises of the singular values, by numpy's own decomposition.
        assert ((values := np.linalg.svd(mine, compute_uv=False)) > 0.6).all()
        assert (values < 1.25).all()


def test_three_steps_are_numpys() -> None:
    """Moonlight's step (arXiv 2502.16982, section 2.2), Nesterov's momentum as a running mean; a gate and an up matrix apart."""
    lr, decay, mu, generator = 0.03, 0.2, 0.9, np.random.default_rng(5)
    shapes = {"layers.0.attention.q_proj.weight": (6, 10), "layers.0.moe.experts.gate_up_proj": (2, 8, 5)}
    weights = {name: generator.standard_normal(shape) for name, shape in shapes.items()}
    held = {name: nn.Parameter(torch.from_numpy(weight.copy())) for name, weight in weights.items()}
    bias = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    muon = Muon(torch.optim.AdamW([bias], lr=lr), list(held.items()), lr, decay, mu, torch.float64)
    momenta = {name: np.zeros(shape) for name, shape in shapes.items()}
    for _ in range(3):
        for name, parameter in held.items():
            g = generator.standard_normal(shapes[name])
            parameter.grad = torch.from_numpy(g.copy())
            momenta[name] = mu * momenta[name] + (1 - mu) * g
            u = (1 - mu) * g + mu * momenta[name]
            stack = u.reshape(-1, *u.shape[-2:])
            update = np.empty_like(stack)
            parts = 2 if name.endswith("gate_up_proj") else 1
            for matrix, out in zip(stack, update, strict=True):
                for part in range(parts):
                    piece = matrix[part::parts]
                    out[part::parts] = 0.2 * math.sqrt(max(piece.shape)) * newton_schulz(piece)
            weights[name] = (1 - lr * decay) * weights[name] - lr * update.reshape(u.shape)
        muon.step()
    for name, parameter in held.items():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=0, atol=1e-12, err_msg=name)


class Mixed(nn.Module):
    """A matrix, the parameters that Muon leaves to AdamW, and both in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4, bias=False)
        self.hidden = nn.Linear(3, 4)
        self.lm_head = nn.Linear(3, 4)
        self.double()


def test_the_settings_reach_both_optimizers() -> None:
    config = OptimConfig(
        kind="muon", lr=0.01, weight_decay=0.3, muon_momentum=0.8, beta1=0.7, beta2=0.6, eps=1e-4, fused_adam="torch"
    )
    model = Mixed()
    optimizer = build_optimizer(model, config, torch.float64)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            taken[names[id(parameter)]] = (bool(group.get("muon")), group["weight_decay"], group["lr"])
    assert taken == {
        "embed.weight": (False, 0.3, 0.01),
        "hidden.weight": (True, 0.3, 0.01),
        "hidden.bias": (False, 0.0, 0.01),
        "lm_head.weight": (False, 0.3, 0.01),
        "lm_head.bias": (False, 0.0, 0.01),
    }
    muon = [group for group in optimizer.param_groups if group.get("muon")]
    assert [group["momentum"] for group in muon] == [0.8]
    for group in optimizer.param_groups:
        if not group.get("muon"):
            assert (group["betas"], group["eps"]) == ((0.7, 0.6), 1e-4)
    assert not is_matrix("layers.0.moe.router.weight", torch.zeros(4, 4))
    assert _bounded([]) == []


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_new_optimizer_has_the_peak_rate(kind: str) -> None:
    optimizer = build_optimizer(Mixed(), OptimConfig(kind=kind, lr=0.0125, fused_adam="torch"), torch.float64)  # type: ignore[arg-type]
    assert {group["lr"] for group in optimizer.param_groups} == {0.0125}
