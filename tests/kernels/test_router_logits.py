"""The router's product on the CPU: the bits of torch's own product of widened tokens, and what it must not depend on.

Shape suffixes: T tokens, E experts, D model width.
"""

import pytest
import torch
from torch import Tensor

from megagrin.kernels.router_logits import _router_logits, router_logits
from megagrin.kernels.split_backward import inputs_only
from megagrin.moe.router import Draws, Router, RouterConfig

torch.set_num_threads(1)


def inputs(dtype: torch.dtype, wide: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_TD, w_ED, dz_TE = (torch.randn(*shape, dtype=wide, generator=generator) for shape in ((37, 72), (5, 72), (37, 5)))
    return x_TD.to(dtype).requires_grad_(), w_ED.requires_grad_(), dz_TE


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        *((dtype, torch.float32) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
        *((dtype, torch.float64) for dtype in (torch.bfloat16, torch.float64)),
    ],
    ids=str,
)
def test_bits_of_a_product_of_widened_tokens(dtype: torch.dtype, wide: torch.dtype, autocast: bool) -> None:
    """Logits and gradients, in autocast too, which would round tokens and weights. (The backward pass of torch's own product,
    which tokens of w's dtype take, belongs outside of autocast.)"""
    x_TD, w_ED, dz_TE = inputs(dtype, wide)
    expected = torch.nn.functional.linear(x_TD.to(wide), w_ED)
    gradients = torch.autograd.grad(expected, (x_TD, w_ED), dz_TE)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z_TE = router_logits(x_TD, w_ED)
        if autocast:
            assert torch.nn.functional.linear(x_TD.float(), w_ED.float()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype != wide):
        ours = torch.autograd.grad(z_TE, (x_TD, w_ED), dz_TE)
    assert (z_TE.dtype, *(g.dtype for g in ours)) == (wide, dtype, wide)
    for got, exact in zip((z_TE, *ours), (expected, *gradients), strict=True):
        assert torch.equal(got, exact)


@pytest.mark.parametrize("function", [router_logits, _router_logits], ids=["public", "operator"])
def test_gradcheck(function: object) -> None:
    """The operator, too, which the public function leaves to 16-bit tokens."""
    x_TD, w_ED, _ = inputs(torch.float64, torch.float64)
    strided = x_TD.detach().t().contiguous().t().requires_grad_(), w_ED.detach().t().contiguous().t().requires_grad_()
    for arguments in ((x_TD, w_ED), strided, (x_TD.detach(), w_ED), (x_TD, w_ED.detach())):
        assert torch.autograd.gradcheck(function, arguments)


def test_backward_in_two_halves() -> None:
    """Gradient of the tokens first and of the weights in a second pass, nothing in both: bit for bit those of one pass."""
    x_TD, w_ED, dz_TE = inputs(torch.bfloat16)
    z_TE = router_logits(x_TD, w_ED)
    once = torch.autograd.grad(z_TE, (x_TD, w_ED), dz_TE, retain_graph=True)
    with inputs_only():
        dx, no_dw = torch.autograd.grad(z_TE, (x_TD, w_ED), dz_TE, retain_graph=True, allow_unused=True)
    no_dx, dw = torch.autograd.grad(z_TE, (x_TD, w_ED), dz_TE, allow_unused=True)
    assert (no_dx, no_dw) == (None, None)
    assert torch.equal(dx, once[0])
    assert torch.equal(dw, once[1])


@pytest.mark.parametrize("kind", ["sparsemixer_v2", "gshard"])
def test_router_s_gradients_are_those_of_a_widened_input(kind: str) -> None:
    """With GShard's jitter, too, which multiplies fp32 tokens: fp32 input holding the same numbers gives the same bits."""
    router = Router(72, 5, 2, 0, RouterConfig(kind=kind, input_jitter=0.1))  # type: ignore[arg-type]
    torch.nn.init.normal_(router.weight, std=0.1)
    x_TD, _, dz_TE = inputs(torch.bfloat16)
    found = []
    for leaf in (x_TD, x_TD.detach().float().requires_grad_()):
        z_TE, routing = router(leaf, Draws(0, 0, torch.arange(37)))
        dx, dw = torch.autograd.grad((z_TE * dz_TE).sum() + routing.weight_TK.sum(), (leaf, router.weight))
        found.append((z_TE, routing.expert_TK, routing.weight_TK, dx.bfloat16(), dw))
    for narrow, wide in zip(*found, strict=True):
        assert torch.equal(narrow, wide)
