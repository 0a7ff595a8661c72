"""Cross entropy over the logits of a block of tokens: one kernel reads them, one turns them into their gradient in place.

A program has one token's row and walks over it in slices, in fp32 whatever the dtype in memory.

Shape suffixes: C tokens of a block, V rows of this rank's vocabulary shard.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_SLICE = 4096
_NUM_WARPS = 8


@triton.jit(do_not_specialize=["first"])
def cross_entropy_statistics(logit_ptr, label_ptr, max_ptr, sum_ptr, target_ptr, vocab, first, SLICE: tl.constexpr):
    """Largest logit, Σ e^(logit − largest), and the logit of the label (0 where this shard does not hold it), in one pass."""
    row = tl.program_id(0).to(tl.int64)
    logit_ptr += row * vocab
    # One running maximum and sum per lane; the lanes meet once, at the end.
    top = tl.full((SLICE,), -float("inf"), tl.float32)
    total = tl.zeros((SLICE,), tl.float32)
    for start in range(0, vocab, SLICE):
        column = start + tl.arange(0, SLICE)
        x = tl.load(logit_ptr + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
        # `x > top` is false for a NaN, which must reach the sum all the same: e^(NaN − top).
        higher = x > top
        # Either the old sum shrinks or the new term is small: of the two powers one is e^0. −∞ less −∞ would be NaN: a lane that
        # has seen nothing finite keeps the sum 0.
        factor = tl.where((x == top) & (top == -float("inf")), 0.0, tl.exp(-tl.abs(x - top)))
        total = tl.where(higher, total * factor + 1.0, total + factor)
        top = tl.where(higher, x, top)
    best = tl.max(top, axis=0)
    base = tl.where(best == -float("inf"), 0.0, best)
    tl.store(max_ptr + row, best)
    tl.store(sum_ptr + row, tl.sum(total * tl.exp(top - base), axis=0))
    place = tl.load(label_ptr + row) - first
    inside = (place >= 0) & (place < vocab)
    tl.store(target_ptr + row, tl.load(logit_ptr + place, mask=inside, other=0.0).to(tl.float32))


@triton.jit(do_not_specialize=["first"])
def cross_entropy_gradient(logit_ptr, label_ptr, lse_ptr, vocab, first, IGNORE: tl.constexpr, SLICE: tl.constexpr):
    """Logits become e^(logit − lse) − one-hot(label), rounded once; zeros where the label is IGNORE."""
    row = tl.program_id(0).to(tl.int64)
    logit_ptr += row * vocab
    label = tl.load(label_ptr + row)
    lse = tl.load(lse_ptr + row)
    for start in range(0, vocab, SLICE):
        column = start + tl.arange(0, SLICE)
        x = tl.load(logit_ptr + column, mask=column < vocab, other=0.0).to(tl.float32)
        gradient = tl.exp(x - lse) - tl.where(column == label - first, 1.0, 0.0)
        gradient = tl.where(label == IGNORE, 0.0, gradient)
        tl.store(logit_ptr + column, gradient.to(logit_ptr.dtype.element_ty), mask=column < vocab)


def _slice(vocab: int) -> int:
    return min(_SLICE, triton.next_power_of_2(vocab))


def statistics(logit_CV: Tensor, label_C: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Launch: (max, sum, target), fp32 (C,) each."""
    n_tokens, vocab = logit_CV.shape
    max_C, sum_C, target_C = (torch.empty(n_tokens, dtype=torch.float32, device=logit_CV.device) for _ in range(3))
    cross_entropy_statistics[(n_tokens,)](
        logit_CV, label_C, max_C, sum_C, target_C, vocab, first, SLICE=_slice(vocab), num_warps=_NUM_WARPS
    )
    return max_C, sum_C, target_C


def gradient_(logit_CV: Tensor, label_C: Tensor, lse_C: Tensor, first: int, ignore: int) -> None:
    """Launch, in place."""
    n_tokens, vocab = logit_CV.shape
    cross_entropy_gradient[(n_tokens,)](
        logit_CV, label_C, lse_C, vocab, first, IGNORE=ignore, SLICE=_slice(vocab), num_warps=_NUM_WARPS
    )
