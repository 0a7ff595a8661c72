"""The SwiGLU expert MLP with the router's weight applied inside: y = W_down · (v ⊙ silu(g) ⊙ u), (g, u) = W_gate_up · x.

Applying the weight v before the down projection is exact because W_down has no bias, and the expert's output then need not be
saved for v's gradient: dL/dv = <W_downᵀ·dL/dy, silu(g) ⊙ u>.

Saved for backward: x (tokens, not their sorted copies, where a plan is given), the pre-activation h, and the routing. The
activation is recomputed, and so is the copy of wide weights in the rows' dtype where none is given.

Gate and up rows of W_gate_up are interleaved, row 2i the gate of feature i and row 2i + 1 its up: both meet in one thread of the
kernels, and a cut of the rows at any even place leaves a smaller expert.

The estimator of SparseMixer-v2 weighs a row differently in the two directions: v in the forward pass, b in the gradient that
reaches the expert and its input. Where the two agree, b is left out.

Shape suffixes: T tokens, R routed rows, K experts per token, D model width, F expert width, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from megagrin.kernels.backend import row_passes, tma_rows, use_triton
from megagrin.kernels.grouped_gemm import check_grouped, check_same, k_grouped_wgrad, m_grouped, m_grouped_dgrad
from megagrin.kernels.launch import eager
from megagrin.kernels.permute import SortPlan, gather_rows, gather_sum
from megagrin.kernels.split_backward import weights_later


def _swiglu(h_R2F: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gate, up, sigmoid(gate) and silu(gate)·up, in fp32 at least."""
    rows, wide = h_R2F.shape[0], torch.promote_types(h_R2F.dtype, torch.float32)
    # Pairs parted in one pass: arithmetic on every second number would run 2 to 3 times slower on the CPU.
    parted_2RF = torch.empty(2, rows, h_R2F.shape[1] // 2, dtype=wide, device=h_R2F.device)
    g_RF, u_RF = parted_2RF.copy_(h_R2F.unflatten(1, (-1, 2)).permute(2, 0, 1))
    s_RF = torch.sigmoid(g_RF)
    return g_RF, u_RF, s_RF, (g_RF * s_RF).mul_(u_RF)


class _Inputs(NamedTuple):
    """What every operator here is given, in the order of `_SCHEMA`; shapes and dtypes as in `expert_mlp`."""

    x: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    v_R: Tensor
    b_R: Tensor | None
    counts_E: Tensor
    source_R: Tensor | None
    place_TK: Tensor | None
    gate_up_copy_E2FD: Tensor | None = None
    down_copy_EDF: Tensor | None = None

    def cast(self) -> "_Inputs":
        """With weights in x's dtype, and a backward weight in any case."""
        gate_up = self.gate_up_E2FD.to(self.x.dtype) if self.gate_up_copy_E2FD is None else self.gate_up_copy_E2FD
        down = self.down_EDF.to(self.x.dtype) if self.down_copy_EDF is None else self.down_copy_EDF
        return self._replace(gate_up_E2FD=gate_up, down_EDF=down, b_R=self.v_R if self.b_R is None else self.b_R)

    def without_weights(self) -> "_Inputs":
        """With empty weights of the same dtypes: what is kept for a later pass should not hold gathered ones in memory."""
        gate_up, down = self.gate_up_E2FD.new_empty(0), self.down_EDF.new_empty(0)
        return self._replace(gate_up_E2FD=gate_up, down_EDF=down, gate_up_copy_E2FD=None, down_copy_EDF=None)

    def use_kernels(self) -> bool:
        """Whether the Triton kernels take these."""
        return use_triton(self.x, "moe_mlp") and tma_rows(self.x.dtype, *self.down_EDF.shape[1:])

    def rows(self) -> Tensor:
        """(R, D): x sorted by expert."""
        return self.x if self.source_R is None or self.place_TK is None else gather_rows(self.x, self.source_R, self.place_TK)


# The three operators share this one list; their functions take it as *args, which a schema in words allows.
_SCHEMA = (
    "Tensor x, Tensor gate_up_E2FD, Tensor down_EDF, Tensor v_R, Tensor? b_R, Tensor counts_E, Tensor? source_R, "
    "Tensor? place_TK, Tensor? gate_up_copy_E2FD, Tensor? down_copy_EDF"
)
_BACKWARD_SCHEMA = f"(Tensor dy_RD, Tensor h_R2F, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"


def _operator(name: str, schema: str, implementation: Callable[..., Any]) -> library.CustomOpDef:
    return library.custom_op(f"megagrin::{name}", implementation, mutates_args=(), schema=schema)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    """y (R, D) and h (R, 2F), or an h without rows where it is not needed."""
    save_h, inputs = args[-1], _Inputs(*args[:-1]).cast()
    x, gate_up_E2FD, down_EDF, v_R, _, counts_E, source_R, place_TK, *_ = inputs
    if inputs.use_kernels():
        from megagrin.kernels.moe_mlp_triton import run_forward

        return run_forward(x, gate_up_E2FD, down_EDF, v_R, counts_E, source_R, place_TK, save_h)
    h_R2F = m_grouped(inputs.rows(), gate_up_E2FD, counts_E)
    act_RF = h_R2F.new_empty(h_R2F.shape[0], down_EDF.shape[2])
    for rows in row_passes(act_RF.shape[0], act_RF.shape[1], 4, x.device):
        act_RF[rows] = _swiglu(h_R2F[rows])[3].mul_(v_R[rows].unsqueeze(1))
    return m_grouped(act_RF, down_EDF, counts_E), h_R2F if save_h else h_R2F.new_empty(0, h_R2F.shape[1])


_expert_mlp_op = _operator("expert_mlp", f"({_SCHEMA}, bool save_h) -> (Tensor, Tensor)", _forward)


@_expert_mlp_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    save_h, inputs = args[-1], _Inputs(*args[:-1])
    rows = inputs.v_R.shape[0]
    h_R2F = inputs.x.new_empty(rows if save_h else 0, inputs.gate_up_E2FD.shape[1])
    return inputs.x.new_empty(rows, inputs.x.shape[1]), h_R2F


def _swiglu_dgrad(dact_RF: Tensor, h_R2F: Tensor, b_R1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of h, the activation weighted by b, and the gradient of v, in fp32 at least."""
    g_RF, u_RF, s_RF, act_RF = _swiglu(h_R2F)
    dact_RF = dact_RF.to(act_RF.dtype)
    dv_R = torch.linalg.vecdot(dact_RF, act_RF)
    dact_RF = dact_RF * b_R1
    # silu(g) = g·s, silu'(g) = s·(1 + g·(1 − s))
    silu_RF = g_RF * s_RF
    dh_R2F = torch.empty(h_R2F.shape, dtype=silu_RF.dtype, device=silu_RF.device)
    dg_RF, du_RF = dh_R2F.unflatten(1, (-1, 2)).unbind(2)
    du_RF.copy_(dact_RF * silu_RF)
    dg_RF.copy_(dact_RF.mul_(u_RF).mul_(silu_RF.mul_(1 - s_RF).add_(s_RF)))
    return dh_R2F, act_RF.mul_(b_R1), dv_R


def _down_dgrad(dy_RD: Tensor, h_R2F: Tensor, down_EDF: Tensor, b_R: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of h, the activation weighted by b, and the gradient of v."""
    dact_RF = m_grouped_dgrad(dy_RD, down_EDF, counts_E)
    dh_R2F, weighted_RF = torch.empty_like(h_R2F), torch.empty_like(dact_RF)
    dv_R = torch.empty(dact_RF.shape[0], dtype=torch.promote_types(dact_RF.dtype, torch.float32), device=dact_RF.device)
    for rows in row_passes(dact_RF.shape[0], dact_RF.shape[1], 8, dact_RF.device):
        dh_R2F[rows], weighted_RF[rows], dv_R[rows] = _swiglu_dgrad(dact_RF[rows], h_R2F[rows], b_R[rows].unsqueeze(1))
    return dh_R2F, weighted_RF, dv_R


def _up_dgrad(dh_R2F: Tensor, gate_up_E2FD: Tensor, counts_E: Tensor, source_R: Tensor | None, place_TK: Tensor | None) -> Tensor:
    dx = m_grouped_dgrad(dh_R2F, gate_up_E2FD, counts_E)
    return dx if source_R is None or place_TK is None else gather_sum(dx, source_R, place_TK)


def _gradients(
    dy_RD: Tensor,
    h_R2F: Tensor,
    given: _Inputs,
    dtypes: tuple[torch.dtype, torch.dtype],
    into: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and v; of the weights in `dtypes`, or added to what `into` has, which then comes back."""
    inputs = given.cast()
    x, gate_up_E2FD, down_EDF, v_R, b_R, counts_E, source_R, place_TK, *_ = inputs
    assert b_R is not None
    if inputs.use_kernels():
        from megagrin.kernels.moe_mlp_triton import run_backward

        weights = (gate_up_E2FD, down_EDF, b_R)
        dx, d_up, d_down, dv_R = run_backward(dy_RD, x, h_R2F, *weights, counts_E, source_R, place_TK, dtypes, into)
        return dx, d_up, d_down, dv_R.to(v_R.dtype)
    dy_RD = dy_RD.contiguous()
    dh_R2F, act_RF, dv_R = _down_dgrad(dy_RD, h_R2F, down_EDF, b_R, counts_E)
    d_down_EDF = k_grouped_wgrad(dy_RD, act_RF, counts_E, dtypes[1], into[1])
    del act_RF  # before the next large buffers
    d_gate_up_E2FD = k_grouped_wgrad(dh_R2F, inputs.rows(), counts_E, dtypes[0], into[0])
    return _up_dgrad(dh_R2F, gate_up_E2FD, counts_E, source_R, place_TK), d_gate_up_E2FD, d_down_EDF, dv_R.to(v_R.dtype)


def _all_gradients(dy_RD: Tensor, h_R2F: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down and v."""
    given = _Inputs(*args)
    return _gradients(dy_RD, h_R2F, given, (given.gate_up_E2FD.dtype, given.down_EDF.dtype))


_expert_mlp_backward_op = _operator("expert_mlp_backward", _BACKWARD_SCHEMA, _all_gradients)
_expert_mlp_backward = eager(_expert_mlp_backward_op, _all_gradients)


@_expert_mlp_backward_op.register_fake
def _(dy_RD: Tensor, h_R2F: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs = _Inputs(*args)
    return tuple(tensor.new_empty(tensor.shape) for tensor in (inputs.x, inputs.gate_up_E2FD, inputs.down_EDF, inputs.v_R))


def _input_gradients(dy_RD: Tensor, h_R2F: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and v; of h, and the activation weighted by b, from which those of the weights follow."""
    inputs = _Inputs(*args).cast()
    x, gate_up_E2FD, down_EDF, v_R, b_R, counts_E, source_R, place_TK, *_ = inputs
    assert b_R is not None
    if inputs.use_kernels():
        from megagrin.kernels.moe_mlp_triton import run_dgrad

        dx, dv_R, dh_R2F, act_RF = run_dgrad(dy_RD, x, h_R2F, gate_up_E2FD, down_EDF, b_R, counts_E, place_TK)
    else:
        dh_R2F, act_RF, dv_R = _down_dgrad(dy_RD.contiguous(), h_R2F, down_EDF, b_R, counts_E)
        dx = _up_dgrad(dh_R2F, gate_up_E2FD, counts_E, source_R, place_TK)
    return dx, dv_R.to(v_R.dtype), dh_R2F, act_RF


_expert_mlp_dgrad_op = _operator("expert_mlp_dgrad", _BACKWARD_SCHEMA, _input_gradients)
_expert_mlp_dgrad = eager(_expert_mlp_dgrad_op, _input_gradients)


@_expert_mlp_dgrad_op.register_fake
def _(dy_RD: Tensor, h_R2F: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs = _Inputs(*args)
    act_RF = dy_RD.new_empty(dy_RD.shape[0], inputs.down_EDF.shape[2])
    return *(tensor.new_empty(tensor.shape) for tensor in (inputs.x, inputs.v_R, h_R2F)), act_RF


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[:-1])
    ctx.set_materialize_grads(False)
    ctx.for_weights = None


def _backward(ctx: Any, dy_RD: Tensor | None, dh: None) -> tuple[Tensor | None, ...]:
    """All gradients at once, or in a pass for inputs only theirs, and in a second pass those of the weights."""
    if dy_RD is None:
        return (None,) * 11
    d_up: Tensor | None = None
    d_down: Tensor | None = None
    if ctx.for_weights is not None:
        # Not from saved_tensors: unpacking them would recompute a checkpointed layer a second time.
        dh_R2F, act_RF, inputs = ctx.for_weights
        ctx.for_weights = None
        d_down = k_grouped_wgrad(dy_RD.contiguous(), act_RF, inputs.counts_E, inputs.down_EDF.dtype)
        d_up = k_grouped_wgrad(dh_R2F, inputs.rows(), inputs.counts_E, inputs.gate_up_E2FD.dtype)
        return None, d_up, d_down, *(None,) * 8
    saved = ctx.saved_tensors
    if weights_later():
        dx, dv_R, dh_R2F, act_RF = _expert_mlp_dgrad(dy_RD, *saved)
        ctx.for_weights = (dh_R2F, act_RF, _Inputs(*saved[1:]).without_weights())
    else:
        dx, d_up, d_down, dv_R = _expert_mlp_backward(dy_RD, *saved)
    return dx, d_up, d_down, dv_R, *(None,) * 7


_expert_mlp_op.register_autograd(_backward, setup_context=_setup)
_expert_mlp = eager(_expert_mlp_op, _forward, once_differentiable(_backward), _setup)


class MainGrad(Protocol):
    """Where the gradient of a weight is added up over micro-batches, in fp32 (fp64 beside fp64 rows)."""

    parameter: Tensor
    """What autograd knows the weight by: a leaf. It makes sure that there is a backward pass."""

    def total(self) -> Tensor | None:
        """What has been added up in this step, contiguous and of the weight's local shape; None before the first gradient."""

    def keep(self, total: Tensor) -> None:
        """Take the total: the step's first gradient, or what `total` gave, with a gradient added."""

    def for_autograd(self, gradient: Tensor) -> Tensor:
        """A local gradient as autograd wants it for the parameter."""


def _only_accumulates(parameter: Tensor) -> bool:
    """Whether all that this backward pass will do with a leaf's gradient is to add it to those before.

    Not so where a hook wants to see it, in `torch.autograd.grad`, and in `backward(inputs=...)` without the leaf.
    """
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks or torch._C._functorch.peek_interpreter_stack():
        return False
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(parameter).node)
    except RuntimeError:  # what it does of leaves in torch.autograd.grad
        return False


class _AddsUp(torch.autograd.Function):
    """The operator with gradients of weights that autograd never sees: the kernels add them to the step's total.

    The first one of a step is stored, not added to zeros: that would write the total twice and read it once.
    """

    @staticmethod
    def forward(ctx: Any, main_grads: tuple[MainGrad, MainGrad], *args: Any) -> Tensor:
        """args: both parameters, and the operator's own arguments."""
        y_RD, h_R2F = _expert_mlp(*args[2:])
        ctx.main_grads = main_grads
        ctx.save_for_backward(h_R2F, *args[2:-1])
        ctx.set_materialize_grads(False)
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy_RD is None:
            return (None,) * 14
        h_R2F, *rest = ctx.saved_tensors
        mains = ctx.main_grads
        if not all(_only_accumulates(main.parameter) for main in mains):
            dx, d_up, d_down, dv_R = _expert_mlp_backward(dy_RD, h_R2F, *rest)
            weights = (main.for_autograd(d) for main, d in zip(mains, (d_up, d_down), strict=True))
            return None, *weights, dx, None, None, dv_R, *(None,) * 7
        given = _Inputs(*rest)
        wide = torch.promote_types(given.x.dtype, torch.float32)
        dx, d_up, d_down, dv_R = _gradients(dy_RD, h_R2F, given, (wide, wide), (mains[0].total(), mains[1].total()))
        for main, total in zip(mains, (d_up, d_down), strict=True):
            main.keep(total)
        return None, None, None, dx, None, None, dv_R, *(None,) * 7


def expert_mlp(
    x: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    weight_R: Tensor,
    counts_E: Tensor,
    backward_weight_R: Tensor | None = None,
    plan: SortPlan | None = None,
    copies: tuple[Tensor, Tensor] | None = None,
    main_grads: tuple[MainGrad, MainGrad] | None = None,
) -> Tensor:
    """Run every expert on its block of rows.

    Args:
        x: (R, D) rows sorted by expert, or with a plan (T, D) tokens: the rows are then gathered inside and not kept.
        gate_up_E2FD: (E, 2F, D), gate and up rows interleaved. x's dtype, or float32 beside 16-bit rows: cast inside, and its
            gradient comes from the products' fp32 sums (rounded to x's dtype in between on the CPU only).
        down_EDF: (E, D, F), likewise.
        weight_R: (R,) fp32 (fp64 beside fp64 rows), the router's weight of each row in the forward pass.
        counts_E: int64 (E,), rows per expert, zeros allowed, summing to R (not checked on CUDA).
        backward_weight_R: (R,) like weight_R: what weighs the gradient to the expert and to x instead; None means weight_R.
        plan: how the tokens of x are sorted into rows.
        copies: gate_up and down in x's dtype, where float32 ones need not be cast anew. They are read again in backward.
        main_grads: of gate_up and down, whose parameters are leaves: a plain `backward()` adds their gradients there, by the
            kernels, and autograd is given none. Autograd is given them where it is asked for more than a sum.

    Returns:
        (R, D), the weighted output of each row.

    Raises:
        ValueError: shapes, dtypes, devices or (on the CPU) counts that do not fit.
    """
    check_grouped(x, gate_up_E2FD, counts_E, wide_weights=True)
    if down_EDF.shape != (gate_up_E2FD.shape[0], x.shape[1], gate_up_E2FD.shape[1] // 2) or gate_up_E2FD.shape[1] % 2:
        raise ValueError(
            f"expert_mlp: gate_up {tuple(gate_up_E2FD.shape)} and down {tuple(down_EDF.shape)} must be (E, 2F, D) and (E, D, F)"
        )
    check_same("expert_mlp: down", down_EDF, "gate_up", gate_up_E2FD)
    if plan is not None and plan.place_TK.shape[0] != x.shape[0]:
        raise ValueError(f"expert_mlp: the plan sorts {plan.place_TK.shape[0]} tokens, x {tuple(x.shape)} holds {x.shape[0]}")
    rows = x.shape[0] if plan is None else plan.source_R.shape[0]
    for name, weight in (("weight", weight_R), ("backward_weight", backward_weight_R)):
        if weight is None:
            continue
        if weight.shape != (rows,):
            raise ValueError(f"expert_mlp: {name} {tuple(weight.shape)} must be ({rows},), one number a row")
        if weight.dtype not in (torch.float32, torch.float64) or weight.device != x.device:
            raise ValueError(
                f"expert_mlp: {name} is {weight.dtype} on {weight.device}; it must be float32 or float64 on {x.device}"
            )
    _check_copies(x, (gate_up_E2FD, down_EDF), copies)
    mains = main_grads or ()
    differentiable = (x, gate_up_E2FD, down_EDF, weight_R, *(main.parameter for main in mains))
    save_h = torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
    source_R, place_TK = (None, None) if plan is None else (plan.source_R, plan.place_TK)
    rest = (weight_R, backward_weight_R, counts_E, source_R, place_TK, *(copies or (None, None)), save_h)
    if main_grads is None or not save_h:
        return _expert_mlp(x, gate_up_E2FD, down_EDF, *rest)[0]
    # Detached: autograd must not look for gradients of these on ways of its own.
    return _AddsUp.apply(mains, *(main.parameter for main in mains), x, gate_up_E2FD.detach(), down_EDF.detach(), *rest)


def _check_copies(x: Tensor, weights: tuple[Tensor, Tensor], copies: tuple[Tensor, Tensor] | None) -> None:
    for name, weight, copy in zip(("gate_up", "down"), weights, copies or (), strict=False):
        if (copy.shape, copy.dtype, copy.device) != (weight.shape, x.dtype, x.device):
            raise ValueError(
                f"expert_mlp: the copy of {name} {tuple(copy.shape)} {copy.dtype} on {copy.device} must be {x.dtype} of shape "
                f"{tuple(weight.shape)} on {x.device}"
            )
