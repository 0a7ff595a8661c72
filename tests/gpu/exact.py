"""fp64 twins of the ops that round where the kernels say they round, and a distance that counts roundings."""

import torch
from torch import Tensor


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as fp64 after one rounding to dtype."""
    return x.to(dtype).double()


def roundings(got: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """‖got − exact‖ over ‖exact − its own rounding‖: about 1 where the last rounding is the only error."""
    own = (rounded(exact, dtype) - exact).norm()
    return float((got.double() - exact).norm() / own.clamp_min(1e-300))


def relative(got: Tensor, exact: Tensor) -> float:
    """‖got − exact‖ over ‖exact‖; 0 where both are zero."""
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def experts_of(counts: list[int]) -> Tensor:
    """Expert of each row."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).cuda()


def per_row(x_RK: Tensor, w_ENK: Tensor, counts: list[int]) -> Tensor:
    """w[e]·x[r] in fp64, block by block."""
    parts = [x @ w.T for x, w in zip(x_RK.split(counts), w_ENK, strict=True)]
    return torch.cat(parts)


def per_expert(dy_RN: Tensor, x_RK: Tensor, counts: list[int]) -> Tensor:
    """Σ dy ⊗ x of each expert in fp64."""
    return torch.stack([dy.T @ x for dy, x in zip(dy_RN.split(counts), x_RK.split(counts), strict=True)])


def swiglu(h_R2F: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gate, up, sigmoid(gate), silu(gate)·up) of interleaved columns."""
    gate_RF, up_RF = h_R2F[:, 0::2], h_R2F[:, 1::2]
    s_RF = torch.sigmoid(gate_RF)
    return gate_RF, up_RF, s_RF, gate_RF * s_RF * up_RF


def expert_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, v_R: Tensor, b_R: Tensor, dy: Tensor, counts: list[int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output and gradients in fp64; h, the weighted activations and dh are rounded to dtype, products are not.

    All inputs fp64 that dtype holds exactly (v_R and b_R: that fp32 holds).
    """
    h = rounded(per_row(x, gate_up, counts), dtype)
    gate, up, s, act = swiglu(h)
    dact = per_row(dy, down.transpose(1, 2), counts)
    scaled = dact * b_R[:, None]
    dh = torch.empty_like(h)
    dh[:, 0::2], dh[:, 1::2] = scaled * up * s * (1 + gate * (1 - s)), scaled * gate * s
    dh = rounded(dh, dtype)
    return {
        "y": per_row(rounded(act * v_R[:, None], dtype), down, counts),
        "dx": per_row(dh, gate_up.transpose(1, 2), counts),
        "d gate_up": per_expert(dh, x, counts),
        "d down": per_expert(dy, rounded(act * b_R[:, None], dtype), counts),
        "dv": (dact * act).sum(1),
    }
