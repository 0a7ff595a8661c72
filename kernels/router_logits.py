"""The router's product: fp32 logits from 16-bit tokens and fp32 weights, without an fp32 copy of the tokens.

Products are exact and summed in fp32. For the backward pass nothing is kept but the tokens as they are, which the layer keeps
anyway, and the weights. This file holds the PyTorch reference and the op; router_logits_triton.py holds the kernels, for bf16.

The reference widens the tokens for the time of a product: its logits have the bits of `linear(x.float(), w)`.

Shape suffixes: T tokens, E experts, D model width.
"""

from typing import Any

import torch
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from megagrin.kernels.backend import tma_rows, use_triton
from megagrin.kernels.grouped_gemm import check_float
from megagrin.kernels.launch import eager
from megagrin.kernels.split_backward import weights_later


def _use_kernels(x_TD: Tensor, w_ED: Tensor) -> bool:
    """w_ED: the weights, or another tensor of their dtype."""
    taken = x_TD.dtype == torch.bfloat16 and w_ED.dtype == torch.float32
    return taken and use_triton(x_TD, "router_logits") and tma_rows(x_TD.dtype, x_TD.shape[1])


def _exact(device: torch.device) -> torch.autocast:
    """A region without autocast, which operators do not leave by themselves."""
    return torch.autocast(device.type, enabled=False)


def _logits(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    if _use_kernels(x_TD, w_ED):
        from megagrin.kernels.router_logits_triton import run_logits

        return run_logits(x_TD, w_ED)
    with _exact(x_TD.device):
        return torch.nn.functional.linear(x_TD.to(w_ED.dtype), w_ED)


_router_logits_op = library.custom_op("megagrin::router_logits", _logits, mutates_args=())


@_router_logits_op.register_fake
def _(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    return w_ED.new_empty(x_TD.shape[0], w_ED.shape[0])


def _dgrad(dz_TE: Tensor, x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """Gradient of x, rounded to its dtype once."""
    if _use_kernels(x_TD, w_ED):
        from megagrin.kernels.router_logits_triton import run_dgrad

        return run_dgrad(dz_TE, w_ED)
    with _exact(x_TD.device):
        return torch.mm(dz_TE, w_ED).to(x_TD.dtype)


_router_dgrad_op = library.custom_op("megagrin::router_dgrad", _dgrad, mutates_args=())
_router_dgrad = eager(_router_dgrad_op, _dgrad)


@_router_dgrad_op.register_fake
def _(dz_TE: Tensor, x_TD: Tensor, w_ED: Tensor) -> Tensor:
    return x_TD.new_empty(x_TD.shape)


def _wgrad(dz_TE: Tensor, x_TD: Tensor) -> Tensor:
    """Gradient of w, in the dtype of dz."""
    if _use_kernels(x_TD, dz_TE):
        from megagrin.kernels.router_logits_triton import run_wgrad

        return run_wgrad(dz_TE, x_TD)
    with _exact(x_TD.device):
        return torch.mm(dz_TE.t(), x_TD.to(dz_TE.dtype))


_router_wgrad_op = library.custom_op("megagrin::router_wgrad", _wgrad, mutates_args=())
_router_wgrad = eager(_router_wgrad_op, _wgrad)


@_router_wgrad_op.register_fake
def _(dz_TE: Tensor, x_TD: Tensor) -> Tensor:
    return dz_TE.new_empty(dz_TE.shape[1], x_TD.shape[1])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)
    ctx.for_weights = None


def _backward(ctx: Any, dz_TE: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients at once, or in a pass for inputs only that of x, and in a second pass that of the weights."""
    if dz_TE is None:
        return None, None
    if ctx.for_weights is not None:
        # Not from saved_tensors: unpacking them would recompute a checkpointed layer a second time.
        x_TD, ctx.for_weights = ctx.for_weights, None
        return None, _router_wgrad(dz_TE, x_TD)
    x_TD, w_ED = ctx.saved_tensors
    to_x, to_w = ctx.needs_input_grad
    if to_w and weights_later():
        ctx.for_weights, to_w = x_TD, False
    return (
        _router_dgrad(dz_TE, x_TD, w_ED) if to_x else None,
        _router_wgrad(dz_TE, x_TD) if to_w else None,
    )


_router_logits_op.register_autograd(_backward, setup_context=_setup)
_router_logits = eager(_router_logits_op, _logits, once_differentiable(_backward), _setup)


def router_logits(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """z = x·wᵀ with exact products and sums in w's dtype, differentiably and whatever autocast says.

    Args:
        x_TD: (T, D) bfloat16 or float16, or of w's dtype.
        w_ED: (E, D) float32 or float64.

    Returns:
        (T, E) in w's dtype. A token's logits do not depend on the other tokens' numbers, and with the kernels not on its place
        among them either. There an infinite number makes its token's logits NaN: it meets the zeros in the weights' finer parts.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if x_TD.dim() != 2 or w_ED.dim() != 2 or x_TD.shape[1] != w_ED.shape[1]:
        raise ValueError(f"router_logits: x {tuple(x_TD.shape)} and w {tuple(w_ED.shape)} must be (T, D) and (E, D) with one D")
    if w_ED.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"router_logits: w is {w_ED.dtype}; it must be float32 or float64")
    check_float("router_logits: x", x_TD)
    if (x_TD.dtype.itemsize > 2 and x_TD.dtype != w_ED.dtype) or x_TD.device != w_ED.device:
        raise ValueError(
            f"router_logits: x is {x_TD.dtype} on {x_TD.device}, w is {w_ED.dtype} on {w_ED.device}; x must be bfloat16, float16 "
            "or of w's dtype, on one device"
        )
    if x_TD.dtype == w_ED.dtype:
        # Nothing is widened, so nothing would be kept beside x: torch's own product, differentiable twice.
        with _exact(x_TD.device):
            return torch.nn.functional.linear(x_TD, w_ED)
    return _router_logits(x_TD, w_ED)
