"""SparseMixer's router in one kernel forward and one backward: logits in; experts, weights and the router's sums out.

The algorithm and its reference in PyTorch stand in `megagrin/moe/router.py`; here is the fused form for fp32 logits on CUDA (and
under Triton's interpreter).

**Draws do not depend on the device.** A draw is a function of the token's random word and of its masked softmax. The words are
integers. The softmax that is sampled from is `reproducible_softmax`: only operations that IEEE 754 rounds to one possible result
(+, −, ×, 1/x, conversions) in a fixed order, and a sum in integers, whose order does not matter. So equal logits give equal
experts on CPU and GPU, whatever the tile or the launch. A library's exponential would not: those of two devices differ in the
last bit, which moves a draw now and then (none of 13 million in a trial; a long run makes 10^12). Logits are sums over the model
width, and those do differ between devices.

Shape suffixes: T tokens, E experts, K experts per token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from megagrin.kernels.backend import use_triton
from megagrin.kernels.launch import eager

_FIXED_POINT = 1 << 30
# A tile holds whole rows of logits.
_MAX_EXPERTS = 1024


def reproducible_exp(x: Tensor) -> Tensor:
    """e^x of fp32 numbers x ≤ 0 (−∞ allowed), to about one unit in the last place, the same bits on every device.

    2^n · e^r with |r| ≤ ln(2)/2 and the Taylor polynomial of degree 7, whose remainder is below 2^-27. Under 2^-126.5 it gives 0.
    """
    x = x.clamp(min=-88.0)
    exponent = torch.floor(x * 1.4426950408889634 + 0.5)
    # ln 2 in two parts; the first has 9 bits, so that its product is exact.
    rest = (x - exponent * 0.693359375).add_(exponent * 2.12194440054690583e-4)
    y = (rest * (1 / 5040)).add_(1 / 720)
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        y.mul_(rest).add_(coefficient)
    # The bits of 2^exponent; 2^-127 comes out as 0.
    bits = exponent.to(torch.int32).add_(127).bitwise_left_shift_(23)
    return y.mul_(bits.view(torch.float32))


def reproducible_softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension, the same bits on every device.

    Args:
        x: fp32 logits minus their largest: ≤ 0, −∞ for what must not be drawn.
    """
    e = reproducible_exp(x)
    total = (e * _FIXED_POINT).to(torch.int64).sum(dim=-1, keepdim=True)
    return e * (total.to(torch.float32) * (1 / _FIXED_POINT)).reciprocal()


class Routed(NamedTuple):
    """Outputs of `sparsemixer`.

    Attributes:
        expert_TK: int64.
        weight_TK: fp32, ω·p in training (p without draws); carries the router's gradient.
        backward_weight_TK: fp32, c·p (p without draws), detached.
        prob_sum_E: fp32, Σ_t softmax(z_t), unmasked and without temperature; differentiable.
        z_sum: fp32 scalar, Σ_t logsumexp(z_t)²; differentiable.
        counts_E: int64, rows per expert.
    """

    expert_TK: Tensor
    weight_TK: Tensor
    backward_weight_TK: Tensor
    prob_sum_E: Tensor
    z_sum: Tensor
    counts_E: Tensor


def _forward(
    z_TE: Tensor,
    token_T: Tensor | None,
    top_k: int,
    seed: int,
    step: int,
    layer: int,
    limit: float,
    paper_mask: bool,
    temperature: float,
    bernoulli: int,
    gradient: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from megagrin.kernels import sparsemixer_triton

    token_T = None if token_T is None else token_T.contiguous()
    place, mask, estimator = (seed, step, layer), (limit, paper_mask), (temperature, bernoulli, gradient)
    return sparsemixer_triton.forward(z_TE.contiguous(), token_T, top_k, place, mask, estimator)


_sparsemixer_op = library.custom_op("megagrin::sparsemixer", _forward, mutates_args=())


@_sparsemixer_op.register_fake
def _(z_TE: Tensor, token_T: Tensor | None, top_k: int, *_rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_tokens, n_experts = z_TE.shape
    expert_TK = z_TE.new_empty((n_tokens, top_k), dtype=torch.int64)
    weight_TK, backward_weight_TK = z_TE.new_empty((n_tokens, top_k)), z_TE.new_empty((n_tokens, top_k))
    counts_E = z_TE.new_empty((n_experts,), dtype=torch.int64)
    return expert_TK, weight_TK, backward_weight_TK, z_TE.new_empty((n_experts,)), z_TE.new_empty(()), counts_E


def _gradient(
    z_TE: Tensor,
    expert_TK: Tensor,
    d_weight_TK: Tensor,
    d_prob_E: Tensor,
    d_z_sum: Tensor,
    limit: float,
    paper_mask: bool,
    temperature: float,
    gradient: float,
) -> Tensor:
    from megagrin.kernels import sparsemixer_triton

    z_TE, d_weight_TK, d_prob_E = z_TE.contiguous(), d_weight_TK.contiguous(), d_prob_E.contiguous()
    mask, factors = (limit, paper_mask), (temperature, gradient)
    return sparsemixer_triton.backward(z_TE, expert_TK.contiguous(), d_weight_TK, d_prob_E, d_z_sum, mask, factors)


_sparsemixer_backward_op = library.custom_op("megagrin::sparsemixer_backward", _gradient, mutates_args=())
_sparsemixer_backward = eager(_sparsemixer_backward_op, _gradient)


@_sparsemixer_backward_op.register_fake
def _(z_TE: Tensor, *_rest: Any) -> Tensor:
    return z_TE.new_empty(z_TE.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    z_TE, token_T, _top_k, _seed, _step, _layer, limit, paper_mask, temperature, _bernoulli, gradient = inputs
    ctx.save_for_backward(z_TE, output[0])
    # Without draws nothing is estimated: the weight is p, and so is its gradient.
    ctx.arguments = (limit, paper_mask, temperature, gradient if token_T is not None else 1.0)
    ctx.set_materialize_grads(False)  # zeros for the three outputs without a gradient were three launches


def _backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    _, d_weight_TK, _, d_prob_E, d_z_sum, _ = d_outputs  # expert, backward weight and counts have no gradient
    if d_weight_TK is None and d_prob_E is None and d_z_sum is None:
        return (None,) * 11
    z_TE, expert_TK = ctx.saved_tensors
    d_weight_TK = z_TE.new_zeros(expert_TK.shape) if d_weight_TK is None else d_weight_TK
    d_prob_E = z_TE.new_zeros(z_TE.shape[1]) if d_prob_E is None else d_prob_E
    d_z_sum = z_TE.new_zeros(()) if d_z_sum is None else d_z_sum
    return _sparsemixer_backward(z_TE, expert_TK, d_weight_TK, d_prob_E, d_z_sum, *ctx.arguments), *(None,) * 10


_sparsemixer_op.register_autograd(_backward, setup_context=_setup_context)
_sparsemixer = eager(_sparsemixer_op, _forward, once_differentiable(_backward), _setup_context)


def sparsemixer(
    z_TE: Tensor,
    token_T: Tensor | None,
    *,
    top_k: int,
    seed: int,
    step: int,
    layer: int,
    mask_rule: str,
    mask_eps: float,
    temperature: float,
    bernoulli: float,
    gradient: float,
) -> Routed:
    """SparseMixer-v2 and v2* (GRIN, arXiv 2409.12136, Algorithms 1 to 3), fused.

    Args:
        z_TE: fp32 logits on a CUDA device (any device under Triton's interpreter).
        token_T: int64, index of each token in the global batch, [0, 2^48); None takes the largest logits instead of drawing.
        top_k: experts per token, 1 to E.
        seed: run seed, [0, 2^64).
        step: optimizer step, [0, 2^32).
        layer: layer index, [0, 2^32).
        mask_rule: `code` or `paper`, see `RouterConfig`.
        mask_eps: relative distance of the mask.
        temperature: divides the logits of the masked softmax.
        bernoulli: probability of B = 1.
        gradient: c, the factor on the gradient.

    Raises:
        ValueError: shapes, dtypes or numbers outside these ranges, or a device without the kernel.
    """
    if z_TE.dim() != 2 or z_TE.dtype != torch.float32 or not 1 <= top_k <= z_TE.shape[1] <= _MAX_EXPERTS:
        raise ValueError(
            f"sparsemixer: z {tuple(z_TE.shape)} {z_TE.dtype} and top_k {top_k} must be "
            f"(T, E) float32 and 1 ≤ top_k ≤ E ≤ {_MAX_EXPERTS}"
        )
    if token_T is not None and (token_T.shape != z_TE.shape[:1] or token_T.dtype != torch.int64 or token_T.device != z_TE.device):
        raise ValueError(
            f"sparsemixer: token {tuple(token_T.shape)} {token_T.dtype} on {token_T.device} must be "
            f"({z_TE.shape[0]},) int64 on {z_TE.device}"
        )
    if not use_triton(z_TE, "sparsemixer"):
        raise ValueError(
            f"sparsemixer: z is on {z_TE.device}; the fused router needs CUDA of capability 8.0 with Triton, and not "
            "switched off by MEGAGRIN_KERNELS"
        )
    if mask_rule not in ("code", "paper"):
        raise ValueError(f"sparsemixer: mask_rule {mask_rule!r} must be code or paper")
    if not (0 <= seed < 1 << 64 and 0 <= step < 1 << 32 and 0 <= layer < 1 << 32):
        raise ValueError(f"sparsemixer: seed {seed}, step {step}, layer {layer} must lie in [0, 2^64), [0, 2^32), [0, 2^32)")
    # Operators take signed 64-bit integers; the kernel reads the bits.
    seed = seed - (1 << 64) if seed >= 1 << 63 else seed
    limit = mask_eps if mask_rule == "paper" else 2 * mask_eps
    outputs = _sparsemixer(
        z_TE, token_T, top_k, seed, step, layer, limit, mask_rule == "paper", temperature, int(bernoulli * 2**32), gradient
    )
    routed = Routed(*outputs)
    return routed._replace(backward_weight_TK=routed.backward_weight_TK.detach())
