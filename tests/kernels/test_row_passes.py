"""Elementwise chains of the CPU path go over blocks of rows: same results, and no temporary as large as the whole."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megagrin.kernels import backend, cross_entropy, moe_mlp
from megagrin.kernels.backend import row_passes

torch.set_num_threads(1)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class WideTensors(TorchDispatchMode):
    """Largest number of elements that an operation made in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.largest = max(self.largest, out.numel())
        return out


def logits(dtype: torch.dtype, rows: int = 101, vocab: int = 4096) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, vocab, (rows,), generator=generator)
    label[::5] = cross_entropy.IGNORE
    return torch.randn(rows, vocab, generator=generator).to(dtype), label


def activation(dtype: torch.dtype, rows: int = 701, width: int = 192) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    dy, h = torch.randn(rows, 64, generator=generator), torch.randn(rows, 2 * width, generator=generator)
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.rand(rows, generator=generator).to(wide)
    down = torch.randn(2, 64, width, generator=generator)
    return dy.to(dtype), h.to(dtype), down.to(dtype), weight, torch.tensor([300, rows - 300])


@pytest.mark.parametrize(("rows", "width"), [(0, 7), (1, 1 << 20), (5000, 192), (3, 0)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_row_comes_once(rows: int, width: int, device: str) -> None:
    blocks = list(row_passes(rows, width, 4, torch.device(device)))
    assert [row for block in blocks for row in range(rows)[block]] == list(range(rows))
    assert device == "cpu" or len(blocks) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_activation_does_not_depend_on_the_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    in_blocks = moe_mlp._down_dgrad(*activation(dtype))
    monkeypatch.setattr(backend, "_PASS_ELEMENTS", 1 << 40)
    for part, whole in zip(in_blocks, moe_mlp._down_dgrad(*activation(dtype)), strict=True):
        assert torch.equal(part, whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_logits_does_not_depend_on_the_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    results = []
    for elements in (backend._PASS_ELEMENTS, 1 << 40):
        monkeypatch.setattr(backend, "_PASS_ELEMENTS", elements)
        db_V = torch.zeros(4096, dtype=wide)
        results.append((*cross_entropy._reference_loss_and_gradient_(*logits(dtype), db_V, True), db_V))
    (loss, grad, db), (whole_loss, whole_grad, whole_db) = results
    assert torch.equal(grad, whole_grad)
    torch.testing.assert_close(loss, whole_loss)
    torch.testing.assert_close(db, whole_db)  # its rows are added up block by block


def test_no_temporary_is_as_large_as_the_whole() -> None:
    logit_CV, label_C = logits(torch.bfloat16)
    inputs, db_V = activation(torch.bfloat16), torch.zeros(4096)
    with WideTensors() as in_head:
        cross_entropy._reference_loss_and_gradient_(logit_CV, label_C, db_V, True)
    with WideTensors() as in_experts:
        moe_mlp._down_dgrad(*inputs)
    assert 0 < in_head.largest < logit_CV.numel()
    assert 0 < in_experts.largest < inputs[1].numel() // 2
