"""Context parallelism: slices, masks from places in the sequence, and the same run as one process.

Shape suffixes: B sequences, S positions of a rank, P positions of the sequence.
"""

from dataclasses import replace

import pytest
import torch
from common import MODEL, SEQ, STEPS, Run, assert_same_run, reference, run_steps
from helpers import GlooPool
from torch import Tensor

from megagrin.distributed.mesh import ParallelConfig
from megagrin.nn.attention import Attention, FlexCore, SdpaCore, SequenceMask, sequence_reach, use_backend
from megagrin.parallel.context import by_rank, in_sequence_order, slice_sequence
from megagrin.training import rules
from megagrin.training.run_config import RunConfig, TrainConfig

LONG = pytest.mark.long
CP2, CP4 = ParallelConfig(cp=2), ParallelConfig(cp=4)
ULYSSES = replace(CP2, cp_method="ulysses")


def test_chunks_are_balanced() -> None:
    """Rank c holds chunks c and 2·cp − 1 − c: the keys that its queries see add up to the same number."""
    place_BP = torch.arange(24).unsqueeze(0)
    assert slice_sequence(place_BP, 3, 1)[0].tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    parts = [slice_sequence(place_BP, 3, rank)[0] for rank in range(3)]
    assert sorted(torch.cat(parts).tolist()) == list(range(24))
    assert len({int((part + 1).sum()) for part in parts}) == 1


def test_order_of_gathered_slices() -> None:
    """Slices of all ranks come back as the sequence, and go apart again."""
    whole = torch.randn(2, 3, 16, 5)
    slices = torch.stack([slice_sequence(whole.transpose(1, 2), 4, rank).transpose(1, 2) for rank in range(4)])
    assert torch.equal(in_sequence_order(slices), whole)
    assert torch.equal(by_rank(whole, 4), slices)


@pytest.mark.parametrize(
    ("world_size", "run"),
    [
        pytest.param(2, Run(CP2, 4, "fp32", STEPS), id="cp2-fp32"),
        pytest.param(2, Run(CP2, 2, "fp64", STEPS, documents=True), id="cp2-documents-accumulation"),
        pytest.param(2, Run(ULYSSES, 4, documents=True), id="ulysses"),
        pytest.param(2, Run(ULYSSES, 8, model=replace(MODEL, window=SEQ)), id="ulysses-plain"),
        pytest.param(2, Run(CP2, 8, model=replace(MODEL, window=SEQ)), id="cp2-plain"),
        pytest.param(2, Run(CP2, 8, model=replace(MODEL, window=3)), id="cp2-narrow-window"),
        pytest.param(4, Run(CP4, 8), id="cp4"),
        pytest.param(4, Run(CP2, 2, documents=True), id="cp2-dp2"),
        pytest.param(4, Run(replace(CP2, ep=2), 2, documents=True), id="cp2-ep2"),
        pytest.param(4, Run(replace(CP2, ep=4), 4, documents=True), id="cp2-ep4", marks=LONG),
        pytest.param(4, Run(replace(ULYSSES, ep=2), 2, documents=True), id="ulysses-ep2", marks=LONG),
        pytest.param(4, Run(replace(CP2, ep=2), 2, "fp32", documents=True), id="cp2-ep2-fp32", marks=LONG),
    ],
)
def test_same_run(gloo: GlooPool, world_size: int, run: Run) -> None:
    """Losses, every gradient, update and clip norm of sampled routing, with window, documents and accumulation."""
    assert_same_run(gloo, world_size, run)


def test_bf16(gloo: GlooPool) -> None:
    """bf16 keys, values and their gradients travel, too: losses follow one process's to bf16's precision."""
    run = Run(CP2, 4, "bf16", 2, documents=True)
    for ours in gloo.run(2, run_steps, run):
        torch.testing.assert_close(ours["losses"], reference(gloo, run)["losses"], rtol=1e-3, atol=0)


def _qkv(grad: bool = False, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 4, 24, 16), (2, 2, 24, 16), (2, 2, 24, 16)]
    return [torch.randn(shape, generator=generator).to(device).requires_grad_(grad) for shape in shapes]


DOCUMENTS = torch.tensor([[0] * 7 + [1] * 17, [0] * 24])


@pytest.mark.parametrize("window", [5, 24])
@pytest.mark.parametrize("packed", [False, True])
def test_flex_attention_sees_the_same(window: int, packed: bool) -> None:
    """flex_attention from the same index function as the dense mask; uncompiled, forward only, as CPUs have it."""
    reach = sequence_reach(24, 24, window, DOCUMENTS if packed else None, torch.device("cpu"))
    dense, flex = SdpaCore(), FlexCore()
    torch.testing.assert_close(flex(*_qkv(), flex.mask(reach)), dense(*_qkv(), dense.mask(reach)), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
def test_flex_attention_on_a_gpu(packed: bool) -> None:
    """Compiled, with gradients."""
    device = torch.device("cuda")
    reach = sequence_reach(24, 24, 5, DOCUMENTS.to(device) if packed else None, device)
    results = []
    for core in (SdpaCore(), FlexCore()):
        inputs = _qkv(True, "cuda")
        out = core(*inputs, core.mask(reach))
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "core"),
    [
        ("cpu", torch.bfloat16, 16, SdpaCore),
        ("cuda", torch.bfloat16, 16, FlexCore),
        ("cuda", torch.float32, 16, SdpaCore),
        ("cuda", torch.bfloat16, 8, SdpaCore),
    ],
)
def test_auto_takes_flex_where_it_is_at_home(device: str, dtype: torch.dtype, head_dim: int, core: type) -> None:
    """Every layer and the mask get the same kind; asking for flex on a CPU is refused by name."""
    layers = [Attention(16, 2, 1, head_dim, True, layer) for layer in range(2)]
    mask = SequenceMask(8, SdpaCore())
    use_backend(layers, mask, "auto", torch.device(device), dtype)
    assert {type(layer.core) for layer in layers} | {type(mask.core)} == {core}
    with pytest.raises(ValueError, match=r"engine\.attention: flex needs a CUDA device, this is cpu"):
        use_backend(layers, mask, "flex", torch.device("cpu"), dtype)


def refuse_cache() -> str:
    """What a mask over shared sequences says to a key-value cache."""
    import torch.distributed as dist

    from megagrin.parallel.context import AllGatherMask

    assert dist.group.WORLD is not None
    mask: SequenceMask = AllGatherMask(8, SdpaCore(), dist.group.WORLD)
    with pytest.raises(ValueError, match=r"parallel\.cp") as error:
        mask(1, 5, None, torch.device("cpu"))
    return str(error.value)


def test_no_cache_over_ranks(gloo: GlooPool) -> None:
    """Generation belongs to one process."""
    assert all("generate with parallel.cp=1" in message for message in gloo.run(2, refuse_cache))


def test_rules_of_shared_sequences() -> None:
    """Each refusal names field, value and rule."""
    run = RunConfig(train=TrainConfig(seq_len=60), parallel=replace(CP4, tp=1, cp_method="ulysses"))
    run = replace(run, model=replace(run.model, n_heads=6, n_kv_heads=2))
    broken = "\n".join(rules.violations(run, 4))
    assert "train.seq_len: 60 must be a multiple of 2 × parallel.cp × parallel.tp (8)" in broken
    assert "ulysses needs model.n_heads (6) to be a multiple of parallel.cp × parallel.tp (4)" in broken
    assert "model.n_kv_heads (2)" in broken
    fits = replace(run, train=replace(run.train, seq_len=64), parallel=CP4)
    assert not [line for line in rules.violations(fits, 4) if "cp" in line]
