"""Cross entropy over vocabulary shards on gloo ranks against the whole vocabulary on one process.

Shape suffixes: T tokens, D model width, V vocabulary.
"""

import pytest
import torch
import torch.distributed as dist
from helpers import GlooPool
from torch import Tensor

from megagrin.kernels import cross_entropy
from megagrin.kernels.cross_entropy import VocabShard, linear_cross_entropy

N_TOKENS, D_MODEL = 150, 6
SCALE = -2.5


def make_inputs(vocab: int, dtype: torch.dtype, bias: bool) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(N_TOKENS, D_MODEL), (vocab, D_MODEL), *([(vocab,)] if bias else [])]
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]
    label_T = torch.randint(0, vocab, (N_TOKENS,), generator=generator)
    label_T[::4] = -100
    return tensors, label_T


def bounds(vocab: int, world: int, uneven: bool) -> list[int]:
    """Cuts of the vocabulary: equal but for the last shard, or growing with an empty one in the middle."""
    if uneven:
        cuts = [vocab * rank**2 // world**2 for rank in range(world + 1)]
        cuts[1] = cuts[2]
        return cuts
    size = -(-vocab // world)
    return [min(rank * size, vocab) for rank in range(world + 1)]


def run_shard(vocab: int, dtype: torch.dtype, bias: bool, uneven: bool, block: int) -> tuple[Tensor, ...]:
    """(loss, loss without gradient, dx summed over the ranks, this shard's dw, db)."""
    cross_entropy._BLOCK_TOKENS_GROUP = block
    rank, cuts = dist.get_rank(), bounds(vocab, dist.get_world_size(), uneven)
    rows = slice(cuts[rank], cuts[rank + 1])
    (x_TD, *shared), label_T = make_inputs(vocab, dtype, bias)
    leaves = [t.detach().clone().requires_grad_() for t in (x_TD, *(t[rows] for t in shared))]
    shard = VocabShard(rows.start, dist.group.WORLD)
    arguments = [*leaves, *([] if bias else [None]), label_T]
    loss = linear_cross_entropy(*arguments, shard)
    (loss * SCALE).backward()
    with torch.no_grad():
        quiet = linear_cross_entropy(*arguments, shard)
    dx_TD = leaves[0].grad
    dist.all_reduce(dx_TD)
    return loss.detach(), quiet, dx_TD, *(t.grad for t in leaves[1:])


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("vocab", "bias", "uneven", "block"),
    [(67, True, False, 64), (67, True, True, 4096), (3, True, False, 4096), (3, False, True, 64)],
)
def test_shards_equal_the_whole(
    gloo: GlooPool, world: int, dtype: torch.dtype, vocab: int, bias: bool, uneven: bool, block: int
) -> None:
    results = gloo.run(world, run_shard, vocab, dtype, bias, uneven, block)
    sizes = [len(result[3]) for result in results]
    assert sum(sizes) == vocab
    assert (0 in sizes) == (uneven or vocab < world)
    inputs, label_T = make_inputs(vocab, torch.float64, bias)
    whole = [t.to(dtype).double().requires_grad_() for t in inputs]
    expected = linear_cross_entropy(*whole, *([] if bias else [None]), label_T)
    (expected * SCALE).backward()
    rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (1e-5, 1e-5)
    for loss, quiet, dx_TD, *_ in results:
        assert torch.equal(loss, results[0][0])  # to the last bit
        assert torch.equal(quiet, loss)
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=rtol, atol=0)
        torch.testing.assert_close(dx_TD.double(), whole[0].grad, rtol=rtol, atol=atol)
    for place, exact in enumerate(whole[1:], start=3):
        got = torch.cat([result[place] for result in results])
        torch.testing.assert_close(got.double(), exact.grad, rtol=rtol, atol=atol)


def run_extremes() -> list[float]:
    """Losses of large and of broken logits: one shard far above the other, −∞ in a whole shard, a NaN."""
    rank, losses = dist.get_rank(), []
    for value in (5e3, -torch.inf, torch.nan):
        b_V = torch.zeros(2, dtype=torch.float64)
        if rank == 1:
            b_V[:] = value
        x_TD, w_VD = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
        shard = VocabShard(2 * rank, dist.group.WORLD)
        losses.append(linear_cross_entropy(x_TD, w_VD, b_V, torch.tensor([0]), shard).item())
    return losses


def test_extreme_logits_in_one_shard(gloo: GlooPool) -> None:
    for high, low, broken in gloo.run(2, run_extremes):
        assert high == pytest.approx(5e3 + torch.tensor(2.0).log().item(), rel=1e-12)
        assert low == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)
        assert broken != broken


def run_wrong_label() -> str:
    x_TD, w_VD = torch.zeros(3, 2), torch.zeros(2, 2)
    try:
        linear_cross_entropy(x_TD, w_VD, None, torch.tensor([0, 4, -100]), VocabShard(2 * dist.get_rank(), dist.group.WORLD))
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_label_that_no_shard_holds_is_an_error_on_every_rank(gloo: GlooPool) -> None:
    for message in gloo.run(2, run_wrong_label):
        assert "a label is out of the vocabulary" in message
