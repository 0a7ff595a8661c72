"""The SwiGLU expert MLP with the router's weight applied inside: y = W_down · (v ⊙ silu(g) ⊙ u), (g, u) = W_gate_up · x.

Applying the weight v before the down projection is exact because W_down has no bias, and the expert's output then need not be
saved for v's gradient: dL/dv = <W_downᵀ·dL/dy, silu(g) ⊙ u>.

Saved for backward: x, the pre-activation h = (g, u), and the row weights. The activation is recomputed.

The estimator of SparseMixer-v2 weighs a row differently in the two directions: v in the forward pass, b in the gradient that
reaches the expert and its input. Where the two agree, b is left out.

Shape suffixes: R routed rows, D model width, F expert width, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagrin.kernels.grouped_gemm import _check, k_grouped_wgrad, m_grouped, m_grouped_dgrad


def _swiglu(h_R2F: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gate, up, sigmoid(gate) and silu(gate)·up, in fp32 at least."""
    g_RF, u_RF = h_R2F.to(torch.promote_types(h_R2F.dtype, torch.float32)).chunk(2, dim=-1)
    s_RF = torch.sigmoid(g_RF)
    return g_RF, u_RF, s_RF, (g_RF * s_RF).mul_(u_RF)


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        v_R: Tensor,
        b_R: Tensor | None,
        counts_E: Tensor,
    ) -> Tensor:
        h_R2F = m_grouped(x_RD, gate_up_E2FD, counts_E)
        act_RF = _swiglu(h_R2F)[3].mul_(v_R.unsqueeze(1)).to(x_RD.dtype)
        ctx.save_for_backward(x_RD, h_R2F, gate_up_E2FD, down_EDF, v_R, b_R, counts_E)
        return m_grouped(act_RF, down_EDF, counts_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        x_RD, h_R2F, gate_up_E2FD, down_EDF, v_R, b_R, counts_E = ctx.saved_tensors
        dy_RD = dy_RD.contiguous()
        b_R1 = (v_R if b_R is None else b_R).unsqueeze(1)
        g_RF, u_RF, s_RF, act_RF = _swiglu(h_R2F)
        dact_RF = m_grouped_dgrad(dy_RD, down_EDF, counts_E).to(act_RF.dtype)
        dv_R = torch.linalg.vecdot(dact_RF, act_RF).to(v_R.dtype)
        d_down_EDF = k_grouped_wgrad(dy_RD, act_RF.mul_(b_R1).to(dy_RD.dtype), counts_E)
        dact_RF = dact_RF.mul_(b_R1)
        dh_R2F = torch.empty_like(h_R2F)
        dg_RF, du_RF = dh_R2F.chunk(2, dim=-1)
        # silu(g) = g·s, silu'(g) = s·(1 + g·(1 − s))
        silu_RF = g_RF * s_RF
        du_RF.copy_(dact_RF * silu_RF)
        dg_RF.copy_(dact_RF.mul_(u_RF).mul_(silu_RF.mul_(1 - s_RF).add_(s_RF)))
        d_gate_up_E2FD = k_grouped_wgrad(dh_R2F, x_RD, counts_E)
        return m_grouped_dgrad(dh_R2F, gate_up_E2FD, counts_E), d_gate_up_E2FD, d_down_EDF, dv_R, None, None


def expert_mlp(
    x_RD: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    weight_R: Tensor,
    counts_E: Tensor,
    backward_weight_R: Tensor | None = None,
) -> Tensor:
    """Run every expert on its block of rows.

    Args:
        x_RD: (R, D), rows sorted by expert.
        gate_up_E2FD: (E, 2F, D), gate rows before up rows.
        down_EDF: (E, D, F).
        weight_R: (R,) fp32 (fp64 beside fp64 rows), the router's weight of each row in the forward pass.
        counts_E: int64 (E,), rows per expert, zeros allowed.
        backward_weight_R: (R,) like weight_R: what weighs the gradient to the expert and to x instead; None means weight_R.

    Returns:
        (R, D), the weighted output of each row.

    Raises:
        ValueError: shapes, dtypes, devices or counts that do not fit.
    """
    _check(x_RD, gate_up_E2FD, counts_E)
    if down_EDF.shape != (gate_up_E2FD.shape[0], x_RD.shape[1], gate_up_E2FD.shape[1] // 2) or gate_up_E2FD.shape[1] % 2:
        raise ValueError(
            f"expert_mlp: gate_up {tuple(gate_up_E2FD.shape)} and down {tuple(down_EDF.shape)} must be (E, 2F, D) and (E, D, F)"
        )
    for name, weight in (("weight", weight_R), ("backward_weight", backward_weight_R)):
        if weight is not None and weight.shape != (x_RD.shape[0],):
            raise ValueError(f"expert_mlp: {name} {tuple(weight.shape)} must be ({x_RD.shape[0]},), one number a row")
    return _ExpertMLP.apply(x_RD, gate_up_E2FD, down_EDF, weight_R, backward_weight_R, counts_E)
