"""A small MoE layer forward and backward, for compute-sanitizer: ragged ends, an idle expert, one row alone."""

import torch

from megagrin.kernels.cross_entropy import linear_cross_entropy
from megagrin.kernels.moe_mlp import expert_mlp
from megagrin.kernels.permute import sort_by_expert, unpermute
from megagrin.moe.router import Draws, Router, RouterConfig


def main() -> None:
    """One step; prints the loss."""
    torch.manual_seed(0)
    n_tokens, n_experts, d_model, d_ff = 67, 5, 72, 40
    x_TD = torch.randn(n_tokens, d_model, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    router = Router(d_model, n_experts, 2, 0, RouterConfig(mask_eps=0.9)).cuda()
    torch.nn.init.normal_(router.weight, std=0.1)
    _, routing = router(x_TD, Draws(0, 0, torch.arange(n_tokens, device="cuda")))
    plan = sort_by_expert(routing.expert_TK, n_experts)
    gate_up = (0.1 * torch.randn(n_experts, 2 * d_ff, d_model, device="cuda")).requires_grad_()
    down = (0.1 * torch.randn(n_experts, d_model, d_ff, device="cuda")).requires_grad_()
    weight_R = routing.weight_TK.flatten()[plan.place_TK.flatten().argsort()]
    y_TD = unpermute(expert_mlp(x_TD, gate_up, down, weight_R, plan.counts_E, plan=plan), plan)
    w_VD = (0.1 * torch.randn(101, d_model, device="cuda")).to(torch.bfloat16).requires_grad_()
    loss = linear_cross_entropy(y_TD, w_VD, None, torch.randint(0, 101, (n_tokens,), device="cuda"))
    loss.backward()
    torch.cuda.synchronize()
    assert all(bool(t.grad.isfinite().all()) for t in (x_TD, gate_up, down, w_VD, router.weight))
    print("loss", loss.item())


if __name__ == "__main__":
    main()
