"""Output projection and cross entropy in one pass over blocks of tokens: the (T, V) logits never exist as a whole.

The gradient of the logits, softmax − one-hot, is formed while a block's logits are at hand, and multiplied into the gradients of
x, W and b at once; backward only scales them by the loss's own gradient.

Three ways through a block. On CUDA two kernels work on the logits in their own dtype: one reads them once for the statistics of
each token (largest logit, Σ e^(logit − largest), logit of the label), one overwrites them with their gradient: fp32 logits never
exist. The PyTorch reference on one process takes log-softmax instead, one fused pass in fp32. Over a vocabulary shard both
exchange the statistics between the two steps: three numbers per token and rank, once per block.

Shape suffixes: T tokens, D model width, V vocabulary (rows of this rank's shard), C tokens of a block, P ranks of the group.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from megagrin.kernels.backend import row_passes, use_triton

# Logits of a block, all on one process: small ones on CPU, GPUs want fewer, larger products.
_BLOCK_ELEMENTS_CPU = 1 << 22
_BLOCK_ELEMENTS_CUDA = 1 << 27
# With a group: every rank must cut alike, whatever its share of the vocabulary, and each block costs one exchange.
_BLOCK_TOKENS_GROUP = 4096
IGNORE = -100


@dataclass(frozen=True)
class VocabShard:
    """Which rows of the output projection this rank holds.

    Attributes:
        first: index of its first row in the vocabulary.
        group: the ranks that hold the vocabulary together; shards may differ in size and be empty.
    """

    first: int
    group: dist.ProcessGroup


@library.custom_op("megagrin::cross_entropy_statistics", mutates_args=())
def cross_entropy_statistics(logit_CV: Tensor, label_C: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per token over one shard: largest logit, Σ e^(logit − largest), logit of the label.

    Args:
        logit_CV: any float dtype, contiguous; V may be 0.
        label_C: int64, index in the whole vocabulary.
        first: index of column 0.

    Returns:
        Three (C,) tensors, fp32 (fp64 for fp64 logits): −∞, 0 and 0 where there is nothing.
    """
    wide = torch.promote_types(logit_CV.dtype, torch.float32)
    if 0 in logit_CV.shape:
        zero_C = torch.zeros(logit_CV.shape[0], dtype=wide, device=logit_CV.device)
        return zero_C - torch.inf, zero_C, zero_C.clone()
    if use_triton(logit_CV, "cross_entropy"):
        from megagrin.kernels import cross_entropy_triton

        return cross_entropy_triton.statistics(logit_CV, label_C, first)
    inside_C = (label_C >= first) & (label_C < first + logit_CV.shape[1])
    index_C1 = (label_C - first).masked_fill_(~inside_C, 0).unsqueeze(1)
    target_C = logit_CV.gather(1, index_C1).squeeze(1).to(wide).masked_fill_(~inside_C, 0)
    max_C = logit_CV.amax(1).to(wide)
    base_C1 = max_C.masked_fill(max_C == -torch.inf, 0).unsqueeze(1)
    return max_C, (logit_CV - base_C1).exp_().sum(1), target_C


@cross_entropy_statistics.register_fake
def _(logit_CV: Tensor, label_C: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(logit_CV.dtype, torch.float32)
    max_C, sum_C, target_C = (logit_CV.new_empty(label_C.shape, dtype=wide) for _ in range(3))
    return max_C, sum_C, target_C


@library.custom_op("megagrin::cross_entropy_gradient_", mutates_args={"logit_CV"})
def cross_entropy_gradient_(logit_CV: Tensor, label_C: Tensor, lse_C: Tensor, first: int) -> None:
    """Turn logits into their gradient in place: e^(logit − lse) − one-hot(label), zeros where the label is IGNORE.

    Args:
        logit_CV: any float dtype, contiguous; V may be 0.
        label_C: int64, index in the whole vocabulary.
        lse_C: log Σ e^logit over the whole vocabulary, fp32 (fp64 for fp64 logits).
        first: index of column 0.
    """
    if 0 in logit_CV.shape:
        return
    if use_triton(logit_CV, "cross_entropy"):
        from megagrin.kernels import cross_entropy_triton

        cross_entropy_triton.gradient_(logit_CV, label_C, lse_C, first, IGNORE)
        return
    inside_C = (label_C >= first) & (label_C < first + logit_CV.shape[1])
    index_C1 = (label_C - first).masked_fill_(~inside_C, 0).unsqueeze(1)
    grad_CV = (logit_CV - lse_C.unsqueeze(1)).exp_().scatter_add_(1, index_C1, -inside_C.to(lse_C.dtype).unsqueeze(1))
    logit_CV.copy_(grad_CV.masked_fill_((label_C == IGNORE).unsqueeze(1), 0))


@cross_entropy_gradient_.register_fake
def _(logit_CV: Tensor, label_C: Tensor, lse_C: Tensor, first: int) -> None:
    return None


def _whole_vocabulary(statistics: tuple[Tensor, ...], shard: VocabShard | None) -> tuple[Tensor, Tensor, Tensor]:
    """(log Σ e^logit, loss, how many shards hold the label) per token from each shard's (max, sum, target, found).

    Gathered, not reduced: one exchange instead of two, and every rank adds in the same order.
    """
    mine_4C = torch.stack(statistics)
    if shard is None:
        all_P4C = mine_4C.unsqueeze(0)
    else:
        all_P4C = mine_4C.new_empty(dist.get_world_size(shard.group), *mine_4C.shape)
        all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 warns of the older name
        all_gather(all_P4C.view(-1, mine_4C.shape[1]), mine_4C, group=shard.group)
    max_PC, sum_PC, target_PC, found_PC = all_P4C.unbind(1)
    best_C = max_PC.amax(0)
    base_C = best_C.masked_fill(best_C == -torch.inf, 0)
    log_sum_C = (sum_PC * (max_PC - base_C).exp()).sum(0).log()
    # Not lse − target: of logits in the thousands that difference would keep three digits.
    return base_C + log_sum_C, log_sum_C + (base_C - target_PC.sum(0)), found_PC.sum(0)


def _loss_and_gradient_(logit_CV: Tensor, label_C: Tensor, shard: VocabShard | None, with_grad: bool) -> tuple[Tensor, Tensor]:
    """Summed loss of a block, and the gradient of its logits in place of the logits (untouched without with_grad)."""
    first = 0 if shard is None else shard.first
    max_C, sum_C, target_C = cross_entropy_statistics(logit_CV, label_C, first)
    inside_C = (label_C >= first) & (label_C < first + logit_CV.shape[1])
    lse_C, loss_C, found_C = _whole_vocabulary((max_C, sum_C, target_C, inside_C.to(max_C.dtype)), shard)
    ignored_C = label_C == IGNORE
    # On CUDA an assertion on the device, as an index out of range is.
    torch._assert_async(((found_C == 1) | ignored_C).all(), "linear_cross_entropy: a label is out of the vocabulary")
    loss = loss_C.masked_fill(ignored_C, 0).sum()
    if with_grad:
        cross_entropy_gradient_(logit_CV, label_C, lse_C, first)
    return loss, logit_CV


def _reference_loss_and_gradient_(
    logit_CV: Tensor, label_C: Tensor, db_V: Tensor | None, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """The same on one process without kernels, computed in fp32 (fp64 for fp64 logits) and rounded once.

    The unrounded gradient is added up in db.
    """
    wide = torch.promote_types(logit_CV.dtype, torch.float32)
    valid_C1 = (label_C != IGNORE).unsqueeze(1)
    # Not a clamp: a negative label other than IGNORE must fail in gather, as one beyond V does.
    index_C1 = label_C.unsqueeze(1).masked_fill(~valid_C1, 0)
    loss_C1 = torch.empty(index_C1.shape, dtype=wide, device=logit_CV.device)
    for rows in row_passes(logit_CV.shape[0], logit_CV.shape[1], 1, logit_CV.device):
        # One fused pass reads the logits and writes log-probabilities in fp32; the gradient takes one more in place.
        logp_CV = torch.log_softmax(logit_CV[rows], dim=1, dtype=wide)
        loss_C1[rows] = logp_CV.gather(1, index_C1[rows])
        if with_grad:
            one_C1 = torch.full_like(index_C1[rows], -1, dtype=wide)
            logp_CV.exp_().scatter_add_(1, index_C1[rows], one_C1).masked_fill_(~valid_C1[rows], 0)
            if db_V is not None:
                db_V += logp_CV.sum(0)
            logit_CV[rows] = logp_CV
    return -loss_C1.masked_fill_(~valid_C1, 0).sum(), logit_CV


def _block_tokens(vocab: int, device: torch.device) -> int:
    return max(64, (_BLOCK_ELEMENTS_CUDA if device.type == "cuda" else _BLOCK_ELEMENTS_CPU) // vocab)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, w_VD: Tensor, b_V: Tensor | None, label_T: Tensor, shard: VocabShard | None, with_grad: bool
    ) -> Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=x_TD.device)
        dx_TD = torch.empty_like(x_TD) if with_grad else None
        dw_VD = torch.zeros(w_VD.shape, dtype=wide, device=w_VD.device) if with_grad else None
        db_V = torch.zeros(b_V.shape, dtype=wide, device=w_VD.device) if with_grad and b_V is not None else None
        block = _block_tokens(w_VD.shape[0], x_TD.device) if shard is None else _BLOCK_TOKENS_GROUP
        for start in range(0, x_TD.shape[0], block):
            part = slice(start, start + block)
            x_CD, label_C = x_TD[part], label_T[part].contiguous()
            logit_CV = torch.nn.functional.linear(x_CD, w_VD, b_V)
            if shard is None and not use_triton(logit_CV, "cross_entropy"):
                block_loss, narrow_CV = _reference_loss_and_gradient_(logit_CV, label_C, db_V, with_grad)
            else:
                block_loss, narrow_CV = _loss_and_gradient_(logit_CV.contiguous(), label_C, shard, with_grad)
                if db_V is not None:
                    db_V += narrow_CV.sum(0, dtype=wide)
            loss += block_loss
            if dx_TD is None or dw_VD is None:
                continue
            dx_TD[part] = narrow_CV @ w_VD
            dw_VD.addmm_(narrow_CV.t(), x_CD) if wide == x_TD.dtype else dw_VD.add_(narrow_CV.t() @ x_CD)
        ctx.save_for_backward(dx_TD, dw_VD, db_V)
        ctx.w_dtype = w_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        dx_TD, dw_VD, db_V = ctx.saved_tensors
        dtype = ctx.w_dtype
        db_scaled = None if db_V is None else (db_V * dloss).to(dtype)
        # In dloss's dtype: 1/tokens rounded to bf16 would bend every gradient below the head by up to 0.4 %.
        # The second rounding remains: exact for a power of two, at worst 0.4 % (seen 0.13 %) for a scale just beside one.
        dx_scaled = (dx_TD.to(dloss.dtype) * dloss).to(dx_TD.dtype)
        return dx_scaled, (dw_VD * dloss).to(dtype), db_scaled, None, None, None


def linear_cross_entropy(
    x_TD: Tensor, w_VD: Tensor, b_V: Tensor | None, label_T: Tensor, shard: VocabShard | None = None
) -> Tensor:
    """Sum over tokens of −log softmax(W·x + b)[label].

    Args:
        x_TD: (T, D) float32, float64 or bfloat16; with a shard the same on every rank of its group.
        w_VD: (V, D), same dtype. With a shard its rows of the output projection, possibly none.
        b_V: (V,) or None.
        label_T: int64 (T,), index in the whole vocabulary, or -100 for a token that does not count.
        shard: which rows w holds; None for all of them.

    Returns:
        fp32 scalar (fp64 for fp64 input), in nats, not divided by the number of tokens. With a shard the whole loss, the same
        bits on every rank; the gradients of W and b are this shard's rows, that of x is this shard's part: sum it over the group.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: a label outside the vocabulary that is not -100 (on CUDA a device-side assertion).
    """
    fits = x_TD.dim() == 2 and w_VD.dim() == 2 and x_TD.shape[1] == w_VD.shape[1] and label_T.shape == x_TD.shape[:1]
    if not fits or (b_V is not None and b_V.shape != w_VD.shape[:1]):
        raise ValueError(
            f"linear_cross_entropy: x {tuple(x_TD.shape)}, w {tuple(w_VD.shape)}, b {b_V if b_V is None else tuple(b_V.shape)}, "
            f"label {tuple(label_T.shape)} must be (T, D), (V, D), (V,) or None, (T,)"
        )
    if not x_TD.is_floating_point():
        raise ValueError(f"linear_cross_entropy: x is {x_TD.dtype}; it must be a float dtype")
    for name, other in (("w", w_VD), ("b", b_V)):
        if other is not None and (other.dtype, other.device) != (x_TD.dtype, x_TD.device):
            raise ValueError(
                f"linear_cross_entropy: {name} is {other.dtype} on {other.device}, x is {x_TD.dtype} on {x_TD.device}; "
                "they must agree"
            )
    if label_T.dtype != torch.int64 or label_T.device != x_TD.device:
        raise ValueError(f"linear_cross_entropy: label is {label_T.dtype} on {label_T.device}; it must be int64 on {x_TD.device}")
    return _LinearCrossEntropy.apply(x_TD, w_VD, b_V, label_T, shard, torch.is_grad_enabled())
