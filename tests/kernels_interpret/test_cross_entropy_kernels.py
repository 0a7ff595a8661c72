"""The cross entropy's kernels against fp64: statistics, gradients in place, the whole op, and shards over two ranks.

Shape suffixes: T tokens, C tokens of a block, D model width, V vocabulary.
"""

import math

import pytest
import torch
from helpers import GlooPool
from interpreted import normal, poisoned_memory
from test_cross_entropy_shards import make_inputs, run_shard
from torch import Tensor, library

from megagrin.kernels import cross_entropy
from megagrin.kernels.backend import use_triton
from megagrin.kernels.cross_entropy import cross_entropy_gradient_, cross_entropy_statistics, linear_cross_entropy

torch.set_num_threads(1)
# The interpreter computes with numpy, which warns of what broken and −∞ logits are meant to do.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Distance to a neighbour over the number: the interpreter truncates to bf16, a GPU rounds (half as far).
STEP = {torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def labels(n_tokens: int, low: int, high: int) -> Tensor:
    label_T = torch.randint(low, high, (n_tokens,), generator=torch.Generator().manual_seed(9))
    label_T[::3] = -100
    return label_T


@pytest.mark.parametrize("dtype", list(STEP), ids=str)
@pytest.mark.parametrize("vocab", [1, 3, 67, 4096, 4101])
@pytest.mark.parametrize("n_tokens", [0, 1, 9])
def test_statistics_and_gradient(n_tokens: int, vocab: int, dtype: torch.dtype) -> None:
    """One shard of a larger vocabulary: columns first … first + V of it, labels inside and outside."""
    first, logit_CV = 40, (3 * normal(n_tokens, vocab, seed=1)).to(dtype)
    label_C = labels(n_tokens, 0, 80 + vocab)
    if n_tokens > 1:
        label_C[1:5] = torch.tensor([first, first + vocab - 1, first + vocab, first - 1])  # the shard's edges
    assert use_triton(logit_CV, "cross_entropy")
    with poisoned_memory():
        max_C, sum_C, target_C = cross_entropy_statistics(logit_CV, label_C, first)
    exact_CV = logit_CV.double()
    inside_C = (label_C >= first) & (label_C < first + vocab)
    hot_CV = torch.nn.functional.one_hot((label_C - first).where(inside_C, 0), vocab) * inside_C[:, None]
    assert {t.dtype for t in (max_C, sum_C, target_C)} == {torch.float32}
    assert torch.equal(max_C.double(), exact_CV.amax(1))
    torch.testing.assert_close(sum_C.double(), (exact_CV - exact_CV.amax(1, keepdim=True)).exp().sum(1), rtol=2e-6, atol=0)
    assert torch.equal(target_C.double(), (exact_CV * hot_CV).sum(1))

    lse_C = torch.logsumexp(exact_CV, 1) + 0.5  # other shards have a share
    cross_entropy_gradient_(logit_CV, label_C, lse_C.float(), first)
    expected_CV = ((exact_CV - lse_C[:, None]).exp() - hot_CV) * (label_C != -100)[:, None]
    torch.testing.assert_close(logit_CV.double(), expected_CV, rtol=STEP[dtype], atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_tokens", [0, 1, 63, 65, 129])
def test_the_whole_against_fp64(n_tokens: int, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_BLOCK_ELEMENTS_CPU", 1)  # the smallest block: 64 tokens
    vocab, label_T = 67, labels(n_tokens, 0, 67)
    tensors = [normal(n_tokens, 6, seed=1), normal(vocab, 6, seed=2), *([normal(vocab, seed=3)] if bias else [])]
    ours = [t.to(dtype).requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in ours]
    none = [] if bias else [None]
    with poisoned_memory():
        loss = linear_cross_entropy(*ours, *none, label_T)
        (loss * -2.5).backward()
    logits_TV = exact[0] @ exact[1].T + (exact[2] if bias else 0)
    # Where our path rounds, so does this: logits are kept in dtype.
    rounded_TV = logits_TV + (logits_TV.to(dtype).double() - logits_TV).detach()
    expected = torch.nn.functional.cross_entropy(rounded_TV, label_T, ignore_index=-100, reduction="sum")
    (expected * -2.5).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-4, atol=1e-6)
    for got, want in zip(ours, exact, strict=True):
        scale = want.grad.abs().max().item() if want.numel() else 0.0
        tolerance = 1e-5 if dtype == torch.float32 else 2.0**-6
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=0, atol=tolerance * scale)


def test_large_and_broken_logits() -> None:
    """Far beyond what fp32's exponential holds; −∞ costs nothing; a NaN and +∞ surface in the loss."""

    def loss_of(*row: float) -> float:
        w_V1 = torch.tensor(row).unsqueeze(1)
        return linear_cross_entropy(torch.ones(1, 1), w_V1, None, torch.tensor([0])).item()

    assert loss_of(1e4, 1e4, -1e4) == pytest.approx(math.log(2), rel=1e-5)
    assert loss_of(-1e30, 0, 0) == pytest.approx(1e30, rel=1e-5)
    assert math.isnan(loss_of(0, math.nan, 0))
    logit_CV = torch.tensor([[0.0, -math.inf, 0.0], [-math.inf] * 3, [0.0, math.inf, 0.0], [0.0, math.nan, 0.0]])
    max_C, sum_C, _ = cross_entropy_statistics(logit_CV, torch.zeros(4, dtype=torch.int64), 0)
    assert max_C[:2].tolist() == [0.0, -math.inf]
    assert sum_C[:2].tolist() == [2.0, 0.0]
    assert sum_C[2:].isnan().all()


@pytest.mark.parametrize("wrong", [-1, -99, 67])
def test_labels_outside_the_vocabulary_are_errors(wrong: int) -> None:
    label_T = labels(5, 0, 67)
    label_T[1] = wrong
    with pytest.raises(RuntimeError, match="a label is out of the vocabulary"):
        linear_cross_entropy(torch.zeros(5, 4), torch.zeros(67, 4), None, label_T)


@pytest.mark.parametrize("vocab", [67, 1])
def test_shards_on_two_ranks(gloo: GlooPool, vocab: int) -> None:
    results = gloo.run(2, run_shard, vocab, torch.float32, True, False, 64)
    inputs, label_T = make_inputs(vocab, torch.float64, True)
    whole = [t.float().double().requires_grad_() for t in inputs]
    expected = linear_cross_entropy(*whole, label_T)
    (expected * -2.5).backward()
    for loss, _, dx_TD, *_ in results:
        assert torch.equal(loss, results[0][0])
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dx_TD.double(), whole[0].grad, rtol=1e-5, atol=1e-5)
    for place in (3, 4):
        got = torch.cat([result[place] for result in results])
        torch.testing.assert_close(got.double(), whole[place - 2].grad, rtol=1e-5, atol=1e-5)


def test_ops_are_registered_as_torch_wants_them() -> None:
    """Schema (what is mutated), and the fake tensors, by torch's own checker."""
    logit_CV, label_C = normal(3, 7, seed=1, dtype=torch.float32), torch.tensor([0, -100, 6])
    library.opcheck(torch.ops.megagrin.cross_entropy_statistics.default, (logit_CV, label_C, 0))
    library.opcheck(torch.ops.megagrin.cross_entropy_gradient_.default, (logit_CV, label_C, torch.ones(3), 0))
