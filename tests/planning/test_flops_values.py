"""Peaks of devices against the makers' data sheets, and the measured peak against a clock that is known."""

import itertools

import pytest
import torch

from megagrin.planning import flops

# TFLOP/s of bf16, TF32 and fp32 on the makers' data sheets; where those print the first two "with sparsity", half of it.
SHEETS = {
    "NVIDIA A100-SXM4-80GB": (312, 156, 19.5),
    "NVIDIA H100 PCIe": (1513 / 2, 756 / 2, 51),
    "NVIDIA H100 NVL": (1671 / 2, 835 / 2, 60),
    "NVIDIA H100 80GB HBM3": (1979 / 2, 989 / 2, 67),
    "NVIDIA H200 NVL": (1671 / 2, 835 / 2, 60),
    "NVIDIA H200": (1979 / 2, 989 / 2, 67),
    "NVIDIA GH200 480GB": (1979 / 2, 989 / 2, 67),
    "NVIDIA B200": (4500 / 2, 2250 / 2, 75),
    "NVIDIA GB200": (5000 / 2, 2500 / 2, 80),
    "NVIDIA L40S": (362, 183, 91.6),
    "AMD Instinct MI300X": (1307.4, 653.7, 163.4),
}
# fp16 on tensor cores, and fp32.
V100_SHEETS = {
    "Tesla V100S-PCIE-32GB": (130, 16.4),
    "Tesla V100-PCIE-16GB": (112, 14),
    "Tesla V100-SXM2-32GB": (125, 15.7),
}


@pytest.mark.parametrize("name", SHEETS)
def test_every_listed_peak_is_the_data_sheets(name: str) -> None:
    half, tensor_float, single = (peak * 1e12 for peak in SHEETS[name])
    close = pytest.approx  # the sheets print 989 or 835 for TF32, half of 1979 or 1671
    assert flops.listed_peak_flops(name, torch.bfloat16) == close(half, rel=1e-6)
    assert flops.listed_peak_flops(name, torch.float16) == close(half, rel=1e-6)
    assert flops.listed_peak_flops(name, torch.float32) == close(single, rel=1e-6)
    assert flops.listed_peak_flops(name, torch.float32, tf32=True) == close(tensor_float, rel=1.5e-3)


@pytest.mark.parametrize("name", V100_SHEETS)
def test_volta_has_tensor_cores_for_fp16_alone(name: str) -> None:
    half, single = (peak * 1e12 for peak in V100_SHEETS[name])
    assert flops.listed_peak_flops(name, torch.float16) == pytest.approx(half)
    assert flops.listed_peak_flops(name, torch.float32) == pytest.approx(single)
    assert flops.listed_peak_flops(name, torch.float32, tf32=True) == pytest.approx(single)
    assert flops.listed_peak_flops(name, torch.bfloat16) is None


def test_measured_peak_is_the_work_of_the_best_product_over_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiply-add is two: 2·n³ FLOPs. Of five products the fastest counts; a CPU multiplies 1024 × 1024."""
    durations = iter([0.25, 0.125, 0.03125, 0.1875, 0.0625])
    readings = itertools.chain.from_iterable((100.0, 100.0 + duration) for duration in durations)
    monkeypatch.setattr(flops.time, "perf_counter", lambda: next(readings))
    flops.measured_peak_flops.cache_clear()
    try:
        assert flops.measured_peak_flops(torch.device("cpu"), torch.float32) == 2 * 1024**3 / 0.03125
        assert next(readings, None) is None
    finally:
        flops.measured_peak_flops.cache_clear()


def test_measuring_ends_where_products_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product begins after a second: bf16 on a CPU without instructions for it takes two for one."""
    readings = iter([100.0, 102.0])
    monkeypatch.setattr(flops.time, "perf_counter", lambda: next(readings))
    flops.measured_peak_flops.cache_clear()
    try:
        assert flops.measured_peak_flops(torch.device("cpu"), torch.float32) == 2 * 1024**3 / 2.0
    finally:
        flops.measured_peak_flops.cache_clear()


def test_the_measured_product_has_the_asked_size_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = []
    product = torch.mm

    def seen(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        operands.append((left.shape, right.shape, left.dtype, right.dtype))
        return product(left, right)

    monkeypatch.setattr(torch, "mm", seen)
    flops.measured_peak_flops.cache_clear()
    flops.measured_peak_flops(torch.device("cpu"), torch.bfloat16, 8)
    flops.measured_peak_flops.cache_clear()
    assert operands == [((8, 8), (8, 8), torch.bfloat16, torch.bfloat16)] * 5
