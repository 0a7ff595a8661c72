"""Router, permutation and cross entropy on CUDA against the CPU.

Shape suffixes: T tokens, K experts per token, E experts, D model width, V vocabulary.
"""

import pytest
import torch
from exact import relative, rounded, roundings
from torch import Tensor

from megagrin.kernels.cross_entropy import linear_cross_entropy
from megagrin.kernels.permute import permute, sort_by_expert, unpermute
from megagrin.moe.router import Draws, Router, RouterConfig, Routing

SHAPES = [(1, 1, 1), (63, 16, 2), (65, 3, 3), (4097, 16, 2), (1000, 128, 8), (300, 5, 1)]


def routed(z_TE: Tensor, config: RouterConfig, top_k: int, draws: Draws | None) -> tuple[Routing, Tensor]:
    """Routing of exactly these logits (an identity matrix as router weight) and their leaf."""
    router = Router(z_TE.shape[1], z_TE.shape[1], top_k, 3, config).to(z_TE.device)
    with torch.no_grad():
        router.weight.copy_(torch.eye(z_TE.shape[1]))
    leaf = z_TE.clone().requires_grad_()
    z, routing = router(leaf, draws)
    assert torch.equal(z.detach().cpu(), z_TE.cpu()), "logits were rounded on the way (TF32?)"
    return routing, leaf


KINDS = ("sparsemixer_v2", "sparsemixer_v2_star")
# Each is a compilation: all rules on one shape, all shapes under one rule.
DRAWS = [
    *(((4097, 16, 2), kind, rule, gradient) for kind in KINDS for rule in ("code", "paper") for gradient in ("paper", "code")),
    *((shape, "sparsemixer_v2", "code", "paper") for shape in SHAPES if shape[1:] != (16, 2)),
    ((63, 16, 2), "sparsemixer_v2", "code", "paper"),
]


@pytest.mark.parametrize(("shape", "kind", "mask_rule", "expert_gradient"), DRAWS, ids=str)
def test_draws_are_those_of_the_cpu(shape: tuple[int, int, int], kind: str, mask_rule: str, expert_gradient: str) -> None:
    n_tokens, n_experts, top_k = shape
    config = RouterConfig(kind=kind, mask_rule=mask_rule, mask_eps=0.2, expert_gradient=expert_gradient)  # type: ignore[arg-type]
    z_TE = torch.randn(n_tokens, n_experts)
    token_T = torch.randint(0, 1 << 40, (n_tokens,))
    d_weight = torch.randn(n_tokens, top_k)
    found = []
    for device in ("cpu", "cuda"):
        draws = Draws((1 << 63) + 5, 70000, token_T.to(device))
        routing, leaf = routed(z_TE.to(device), config, top_k, draws)
        (dz,) = torch.autograd.grad(routing.weight_TK, leaf, d_weight.to(device))
        found.append([routing.expert_TK, routing.weight_TK.detach(), dz, routing.backward_weight_TK])
    cpu, cuda = found
    assert torch.equal(cpu[0], cuda[0].cpu()), "another expert was drawn"
    torch.testing.assert_close(cuda[1].cpu(), cpu[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(cuda[2].cpu(), cpu[2], rtol=1e-5, atol=1e-6)
    assert (cpu[3] is None) == (cuda[3] is None)
    if cpu[3] is not None:
        torch.testing.assert_close(cuda[3].cpu(), cpu[3], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inference_takes_the_largest_logits(shape: tuple[int, int, int]) -> None:
    n_tokens, n_experts, top_k = shape
    z_TE = torch.randn(n_tokens, n_experts, device="cuda")
    routing, _ = routed(z_TE, RouterConfig(), top_k, None)
    assert torch.equal(routing.expert_TK, z_TE.topk(top_k, dim=1).indices)


@pytest.mark.parametrize(("d_model", "dtype"), [(7, torch.bfloat16), (4096, torch.bfloat16), (72, torch.float32)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_permutation_is_that_of_the_cpu(shape: tuple[int, int, int], d_model: int, dtype: torch.dtype) -> None:
    n_tokens, n_experts, top_k = shape
    expert_TK = torch.rand(n_tokens, n_experts).argsort(1)[:, :top_k]
    cpu, cuda = sort_by_expert(expert_TK, n_experts), sort_by_expert(expert_TK.cuda(), n_experts)
    for name in ("source_R", "place_TK", "counts_E"):
        assert torch.equal(getattr(cpu, name), getattr(cuda, name).cpu()), name
    x_TD = torch.randn(n_tokens, d_model, dtype=dtype, device="cuda", requires_grad=True)
    rows = permute(x_TD, cuda)
    assert torch.equal(rows, x_TD.detach()[cuda.source_R])
    y_RD = torch.randn(n_tokens * top_k, d_model, dtype=dtype, device="cuda", requires_grad=True)
    summed = unpermute(y_RD, cuda)
    exact = y_RD.detach().double()[cuda.place_TK].sum(1)
    # At most one rounding per addition in dtype; one in all where the sum is kept in fp32.
    limit = 2.0 * torch.finfo(dtype).eps * y_RD.detach().abs().double()[cuda.place_TK].sum(1)
    assert ((summed.double() - exact).abs() <= limit).all()
    (dx,) = torch.autograd.grad(rows, x_TD, y_RD.detach())
    assert torch.equal(dx, summed)
    (dy,) = torch.autograd.grad(summed, y_RD, x_TD.detach())
    assert torch.equal(dy, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n_tokens", "vocab"), [(1, 7), (63, 1000), (129, 32064)])
def test_cross_entropy(n_tokens: int, vocab: int, dtype: torch.dtype) -> None:
    x, w, b = (
        scale * torch.randn(*size, device="cuda") for scale, size in ((1, (n_tokens, 64)), (0.3, (vocab, 64)), (1, (vocab,)))
    )
    x, w, b = (t.to(dtype).requires_grad_() for t in (x, w, b))
    label_T = torch.randint(0, vocab, (n_tokens,), device="cuda")
    label_T[1::3] = -100
    loss = linear_cross_entropy(x, w, b, label_T)
    gradients = torch.autograd.grad(loss, (x, w, b))
    x64, w64, b64 = (t.detach().double() for t in (x, w, b))
    # cuBLAS's own logits: for one token it sums in parts and rounds each (a logit was one rounding off on an H100).
    logits_TV = torch.nn.functional.linear(x, w, b).detach().double()
    exact_TV = x64 @ w64.T + b64
    bound = (2 if dtype == torch.bfloat16 else 64) * torch.finfo(dtype).eps  # fp32: one for each of the sum's terms
    assert ((logits_TV - exact_TV).abs() <= bound * exact_TV.abs().max()).all()
    valid_T1 = (label_T != -100).double()[:, None]
    hot_TV = torch.nn.functional.one_hot(label_T.clamp_min(0), vocab).double()
    narrow_TV = rounded((torch.softmax(logits_TV, 1) - hot_TV) * valid_T1, dtype)
    exact_loss = -(torch.log_softmax(logits_TV, 1) * hot_TV * valid_T1).sum()
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-5, atol=0)
    for name, got, exact in (("dx", gradients[0], narrow_TV @ w64), ("dw", gradients[1], narrow_TV.T @ x64)):
        if dtype == torch.float32:
            assert relative(got, exact) < 1e-5, name
        else:
            assert roundings(got, exact, dtype) < 1.5, (name, roundings(got, exact, dtype))
    assert relative(gradients[2], narrow_TV.sum(0)) < (1e-2 if dtype == torch.bfloat16 else 1e-5)
