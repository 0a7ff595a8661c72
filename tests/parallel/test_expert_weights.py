"""Sums of experts' gradients outside of autograd: what autograd promises holds all the same.

Shape suffixes: E experts, D model width, B sequences, S positions.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megagrin.moe.balance import BalanceConfig
from megagrin.moe.layer import MoELayer
from megagrin.moe.router import RouterConfig
from megagrin.parallel.expert_weights import add_in_place

D, F, E = 8, 6, 4
X_BSD = torch.randn(1, 9, D, generator=torch.Generator().manual_seed(2))
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def layer(sums: bool) -> MoELayer:
    generator = torch.Generator().manual_seed(1)
    made = MoELayer(D, F, E, 2, 0, RouterConfig(), BalanceConfig())
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=generator)
    if sums:
        add_in_place(made, zero=1)
        assert made.experts.main_grads is not None
    return made


def loss(made: Any, scale: float = 1.0) -> Tensor:
    return scale * made(X_BSD, None)[0].square().sum()


def gradients(made: MoELayer) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in made.named_parameters()}


def plain(made: MoELayer) -> Any:
    loss(made).backward()
    loss(made, 3.0).backward()
    return gradients(made)


def asked_for(made: MoELayer) -> Any:
    """torch.autograd.grad of all, and of one that is no expert: nothing is left in any .grad."""
    weights = dict(made.named_parameters())
    found = dict(zip(weights, torch.autograd.grad(loss(made), list(weights.values())), strict=True))
    found["alone"] = torch.autograd.grad(loss(made), made.router.weight)[0]
    assert set(gradients(made).values()) == {None}
    return found


def into_inputs(made: MoELayer) -> Any:
    loss(made).backward(inputs=[made.router.weight, made.experts.down_proj])
    assert made.experts.gate_up_proj.grad is None
    return gradients(made)


def seen_by_hooks(made: MoELayer) -> Any:
    """A hook that changes the gradient, and one that sees the sum."""
    seen: dict[str, Tensor] = {}
    loss(made, 2.0).backward()
    made.experts.gate_up_proj.register_hook(lambda gradient: 5 * gradient)
    made.experts.down_proj.register_post_accumulate_grad_hook(lambda p: seen.update(down=p.grad.clone()))
    loss(made).backward()
    assert torch.equal(seen["down"], made.experts.down_proj.grad)  # type: ignore[arg-type]
    return gradients(made)


def with_other_weights(made: MoELayer) -> Any:
    others = {name: (2 * p.detach()).requires_grad_() for name, p in made.named_parameters()}
    loss(lambda *args: torch.func.functional_call(made, others, args)).backward()
    assert set(gradients(made).values()) == {None}
    return {name: other.grad for name, other in others.items()}


def of_what_made_them(made: MoELayer) -> Any:
    """Weights that are no leaves, as a hypernetwork or LoRA's sum gives."""
    others = {name: p.detach().clone().requires_grad_() for name, p in made.named_parameters()}
    doubled = {name: 2 * other for name, other in others.items()}
    loss(lambda *args: torch.func.functional_call(made, doubled, args)).backward()
    return {name: other.grad for name, other in others.items()}


def beside_a_transposed_one(made: MoELayer) -> Any:
    made.experts.down_proj.grad = torch.ones(F, D, E).permute(2, 1, 0)
    loss(made).backward()
    return gradients(made)


def batched(made: MoELayer) -> Any:
    weights = [made.experts.down_proj, made.router.weight]
    given = torch.tensor([1.0, 2.0])
    return dict(enumerate(torch.autograd.grad(loss(made), weights, given, is_grads_batched=True)))


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
@pytest.mark.parametrize(
    "run",
    [plain, asked_for, into_inputs, seen_by_hooks, with_other_weights, of_what_made_them, beside_a_transposed_one, batched],
)
def test_gradients_are_where_autograd_would_have_put_them(run: Callable[[MoELayer], dict[str, Tensor | None]]) -> None:
    by_autograd, by_kernels = run(layer(False)), run(layer(True))
    assert by_autograd.keys() == by_kernels.keys()
    for name, gradient in by_autograd.items():
        assert (gradient is None) == (by_kernels[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(by_kernels[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_the_sum_stays_in_its_place() -> None:
    made = layer(True)
    places = []
    for _ in range(3):
        loss(made).backward()
        places.append([made.get_parameter(name).grad.data_ptr() for name in EXPERTS])  # type: ignore[union-attr]
    assert places[0] == places[1] == places[2]
