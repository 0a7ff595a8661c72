"""MEGAGRIN_KERNELS: which ops take their kernels, all of them or all but some."""

from pathlib import Path

import pytest
import torch

from megagrin.kernels import backend
from megagrin.kernels.backend import OPS, use_triton

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
X = torch.zeros(2, 8)


@pytest.fixture
def kernels_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that has them."""
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    monkeypatch.setattr(backend, "_triton_installed", lambda: True)


def taken() -> set[str]:
    return {op for op in OPS if use_triton(X, op)}


@pytest.mark.usefixtures("kernels_run_here")
@pytest.mark.parametrize(
    ("choice", "off"),
    [
        ("auto", set()),
        ("torch", set(OPS)),
        ("auto,-sparsemixer", {"sparsemixer"}),
        ("auto,-sparsemixer,-cross_entropy", {"sparsemixer", "cross_entropy"}),
        ("auto,-moe_mlp", {"moe_mlp"}),
        ("auto,-grouped_gemm", {"grouped_gemm", "moe_mlp"}),
        ("auto,-permute", {"permute", "moe_mlp"}),
    ],
)
def test_ops_are_switched_off_one_by_one(monkeypatch: pytest.MonkeyPatch, choice: str, off: set[str]) -> None:
    """The expert MLP launches the kernels of the grouped products and of the permutation: it is off with them."""
    monkeypatch.setenv("MEGAGRIN_KERNELS", choice)
    assert taken() == set(OPS) - off


@pytest.mark.usefixtures("kernels_run_here")
def test_all_ops_are_on_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGAGRIN_KERNELS", raising=False)
    assert taken() == set(OPS)
    assert not any(use_triton(X.double(), op) for op in OPS)


@pytest.mark.parametrize(
    "choice", ["", "triton", "-sparsemixer", "auto,sparsemixer", "auto,-sparsemixr", "auto,", "torch,-permute", "auto, -permute"]
)
def test_other_values_are_refused(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    """Also on a machine that would not take a kernel anyway."""
    monkeypatch.setenv("MEGAGRIN_KERNELS", choice)
    with pytest.raises(
        ValueError, match=rf"MEGAGRIN_KERNELS: {choice!r} must be auto, torch, or auto followed by any of ,-grouped_gemm"
    ):
        use_triton(X, "permute")


def test_names_are_those_of_the_files() -> None:
    """Every file beside Triton kernels of its own is an op; a name without a file is one that is coming."""
    files = {path.name.removesuffix("_triton.py") for path in KERNELS.glob("*_triton.py")}
    assert files - set(OPS) == set()


def test_callers_name_ops_that_exist() -> None:
    """A misspelt name would never be switched off."""
    for path in (*KERNELS.glob("*.py"), KERNELS.parent / "megagrin" / "moe" / "router.py"):
        for call in path.read_text().split("use_triton(")[1:]:
            name = call.partition(")")[0].rpartition('"')[0].rpartition('"')[2]
            assert name in OPS or call.startswith("x: Tensor, op: str)"), f"{path.name}: use_triton({call[:40]}"
