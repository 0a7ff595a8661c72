"""Bytes that a MoE layer reads and writes for each token: the table of docs/kernels.md against what is launched.

Kernels are noted with their operands and not run; operands are counted once, per token: weights, and what has a size per block
or per expert, are left out.
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from counting import Counting
from offline_launches import offline_launches

from megagrin.moe.balance import BalanceConfig
from megagrin.moe.layer import MoELayer, TrainRouting
from megagrin.moe.router import Draws, RouterConfig

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's kernels are computed")
DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"
# Tokens, features, experts, choices; N: column tiles of a row's share of the router's gradient, 256 wide.
T, D, F, E, K = 96, 64, 320, 16, 2
SIZES = {"D": D, "F": F, "E": E, "K": K, "N": -(-F // 256)}
GRIN = {"D": 4096, "F": 6400, "E": 16, "K": 2, "N": 25}
WRITES = {
    "router_logits_kernel": {"z_ptr"},
    "sparsemixer_forward": {"expert_ptr", "weight_ptr", "backward_weight_ptr"},
    "place_kernel": {"source_ptr", "order_ptr", "place_ptr"},
    "gather_numbers_kernel": {"y_ptr", "other_y_ptr"},
    "gather_rows_kernel": {"y_ptr"},
    "up_swiglu_kernel": {"h_desc", "act_desc"},
    "m_grouped_kernel": {"y_desc"},
    "gather_sum_kernel": {"x_ptr"},
    "down_dgrad_kernel": {"dh_desc", "act_desc", "dv_ptr"},
    "sparsemixer_backward": {"dz_ptr"},
    "router_dgrad_kernel": {"dx_desc"},
}


class Moved(NamedTuple):
    """One launch or operator, in bytes per token."""

    name: str
    read: float
    written: float


def _per_token(tensors: list[Tensor]) -> float:
    seen: dict[int, int] = {}
    for tensor in tensors:
        if tensor.dim() and tensor.shape[0] in (T, T * K):
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(seen.values()) / T


class _Noted(Counting):
    """Operators that move something of every token, and the launches between them."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[Moved] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.calls)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.calls) == before + 1 and self.calls[-1].name in ("aten.sum", "aten.add", "aten._to_copy", "aten.mm"):
            given = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
            entry = Moved(self.calls[-1].name.removeprefix("aten."), _per_token(given), _per_token([out]))
            if entry.read or entry.written:
                self.moved.append(entry)
        return out

    def launch(self, name: str, operands: dict[str, Tensor]) -> None:
        written = WRITES.get(name, set())
        read = _per_token([t for operand, t in operands.items() if operand not in written])
        entry = Moved(
            name.removesuffix("_kernel"), read, _per_token([t for operand, t in operands.items() if operand in written])
        )
        if entry.read or entry.written:
            self.moved.append(entry)


def moved_by_a_layer() -> list[list[Moved]]:
    """Forward and backward."""
    from triton.runtime.jit import JITFunction

    layer = MoELayer(D, F, E, K, 0, RouterConfig(), BalanceConfig())
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.experts.to(torch.bfloat16)
    train = TrainRouting(Draws(1, 2, torch.arange(T)), T, torch.full((1, E), 1 / E))
    x_BSD, dy_BSD = torch.randn(1, T, D).bfloat16().requires_grad_(), torch.randn(1, T, D).bfloat16()
    run, noting = JITFunction.run, [_Noted()]

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        named = dict(zip(self.arg_names, args, strict=False)) | options
        operands = {name: getattr(value, "base", value) for name, value in named.items()}
        noting[0].launch(self.fn.__name__, {name: value for name, value in operands.items() if isinstance(value, Tensor)})
        return run(self, *args, grid=grid, warmup=warmup, **options)

    with offline_launches(), mock.patch.object(JITFunction, "run", noted):
        with noting[0] as forward:
            y_BSD, _ = layer(x_BSD, train)
        noting[0] = _Noted()
        with noting[0] as backward:
            torch.autograd.grad(y_BSD, [x_BSD, *layer.parameters()], dy_BSD)
    return [forward.moved, backward.moved]


class Row(NamedTuple):
    """A row of the table: formulas."""

    name: str
    read: str
    written: str
    before: str
    least: str


def _table() -> list[str]:
    section = DOCS.read_text().split("## Bytes that a layer moves\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| ")]


def documented() -> list[list[Row]]:
    """Rows of the table's two halves."""
    rows = [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in _table()]
    at = [index for index, row in enumerate(rows) if row.name in ("forward", "backward")]
    named = [row._replace(name=row.name.split("`")[1]) if "`" in row.name else row for row in rows]
    return [named[at[0] + 1 : at[1] - 1], named[at[1] + 1 : -1]]


def total(formula: str, sizes: dict[str, int]) -> int:
    """What a formula such as 2·K·D + 8·K comes to."""
    assert re.fullmatch(r"[0-9DFEKN·+() ]*", formula), formula
    return int(eval(formula.replace("·", "*"), {}, dict(sizes))) if formula else 0


def test_the_table_is_what_is_moved() -> None:
    for counted, rows in zip(moved_by_a_layer(), documented(), strict=True):
        shown = [Moved(row.name, total(row.read, SIZES), total(row.written, SIZES)) for row in rows]
        assert counted == shown


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_the_sums_are_those_of_the_rows(part: str) -> None:
    """For the model of the preset."""
    rows = documented()[("forward", "backward").index(part)]
    (line,) = [line for line in _table() if line.startswith(f"| **{part},")]
    shown = [int(cell.strip(" *").replace(",", "")) for cell in line.strip("|").split("|")[1:]]
    assert shown == [sum(total(getattr(row, column), GRIN) for row in rows) for column in Row._fields[1:]]
