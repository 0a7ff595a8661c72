"""Which parameters decay, and steps, clipping and norm against torch and formulas written out."""

import math
from dataclasses import replace

import pytest
import torch
from common import BALANCE, MODEL, ROUTER, Run, build_engine, expected_decay, micro_batches
from helpers import GlooPool
from torch import Tensor, nn

from megagrin.models.transformer import Transformer
from megagrin.optim.norm import clip_gradients, gradient_norm
from megagrin.optim.optimizer import OptimConfig, build_optimizer

DENSE = replace(MODEL, n_experts=0, top_k=1)


def random_model(moe: bool) -> Transformer:
    """Random weights and gradients, so that every parameter moves."""
    torch.manual_seed(0)
    model = Transformer(MODEL if moe else DENSE, ROUTER, BALANCE)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("moe", [True, False])
def test_what_decays(kind: str, moe: bool) -> None:
    """Groups by name; and without gradient a decaying parameter shrinks by 1 − lr·λ, another stays."""
    model = random_model(moe)
    optimizer = build_optimizer(model, OptimConfig(kind=kind, lr=0.1, weight_decay=0.25), torch.float32)  # type: ignore[arg-type]
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = expected_decay(moe)
    assert groups == {name: 0.25 if decays else 0.0 for name, decays in expected.items()}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.975 if expected[name] else 1.0), msg=name)


def test_steps_of_adamw() -> None:
    """Three steps by the formula of the paper (Loshchilov and Hutter, algorithm 2), in fp64, no setting at its default."""
    model = random_model(moe=True)
    optim = OptimConfig(lr=0.03, beta1=0.8, beta2=0.7, eps=0.05, weight_decay=0.25)
    optimizer = build_optimizer(model, optim, torch.float32)
    expected = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    moments = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in expected.items()}
    for step in range(1, 4):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradient = parameter.grad.double()
            first, second = moments[name]
            first.mul_(0.8).add_(0.2 * gradient)
            second.mul_(0.7).add_(0.3 * gradient.square())
            update = (first / (1 - 0.8**step)) / ((second / (1 - 0.7**step)).sqrt() + 0.05)
            decay = 0.25 if expected_decay(True)[name] else 0.0
            expected[name] = expected[name] - 0.03 * (update + decay * expected[name])
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_clipping() -> None:
    """A 3-4-12 gradient has norm 13; above the limit all are scaled to it, below none is touched."""

    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(3))]
        made[0].grad, made[1].grad = torch.tensor([3.0, -4.0]), torch.tensor([[12.0]])
        return made

    for limit, factor in ((6.5, 0.5), (26.0, 1.0)):
        clipped = parameters()
        norm = gradient_norm(clipped)
        assert norm.item() == pytest.approx(13.0, rel=1e-12)
        clip_gradients(clipped, norm, limit)
        torch.testing.assert_close(clipped[0].grad, torch.tensor([3.0, -4.0]) * factor)
        torch.testing.assert_close(clipped[1].grad, torch.tensor([[12.0]]) * factor)
        assert clipped[2].grad is None


def one_step() -> dict[str, float]:
    """A step of a dense model, and everything it says computed with torch alone."""
    run = Run(model=DENSE, micro=4, optim=OptimConfig(lr=1.0, warmup_steps=0, clip_norm=0.5))
    engine = build_engine(run)
    batches = micro_batches(run, 0, engine.mesh)
    seen: dict[str, Tensor] = {}
    engine.optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.detach().clone() for name, p in engine.model.named_parameters()})  # type: ignore[union-attr]
    )
    plain = Transformer(DENSE, ROUTER, BALANCE).double()
    plain.load_state_dict({name: full_of(p).clone() for name, p in engine.model.named_parameters()})
    outputs = [plain(batch.tokens_BS, None, batch.positions_BS).logits_BSV.flatten(0, 1) for batch in batches]
    logits = torch.cat(outputs)
    labels = torch.cat([batch.labels_BS.flatten() for batch in batches])
    loss = nn.functional.cross_entropy(logits, labels, ignore_index=-100)
    loss.backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values() if g is not None))
    evaluated = engine.evaluate(batches)
    result = engine.train_step(batches, 0, 1e-3)
    factor = min(1.0, 0.5 / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
    off = max((full_of(seen[n]) - g * factor).abs().max().item() for n, g in gradients.items() if g is not None)
    rates = {group["lr"] for group in engine.optimizer.param_groups}
    assert rates == {1e-3}
    return {
        "loss": result.loss - loss.item(),
        "evaluated": evaluated - loss.item(),
        "norm": (result.grad_norm - norm) / norm,
        "gradient": off,
        "clipped": factor,
    }


def full_of(tensor: Tensor) -> Tensor:
    """The whole tensor."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def test_a_step_against_torch(gloo: GlooPool) -> None:
    """Loss per labelled token, its gradient, norm and clipping, and an evaluation's mean, with labels left out unevenly."""
    differences = gloo.run(1, one_step)[0]
    assert differences.pop("clipped") < 1
    assert all(abs(value) < 1e-10 for value in differences.values()), differences
