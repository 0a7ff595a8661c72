"""The kernels' sigmoid (ex2.approx, rcp.approx) against fp64, with the two functions' errors at their documented worst.

The PTX manual bounds them: ex2.approx.ftz.f32 by a relative error of 2^-22, rcp.approx.ftz.f32 by one unit in the last place.
"""

import re

import numpy as np
import pytest

pytest.importorskip("triton")

from megagrin.kernels import moe_mlp_triton

EX2, RCP = 2.0**-22, 2.0**-23
ROUNDING = 2.0**-24
# Half a unit in the last place of bf16, relative to the number: what rounding the activation costs anyway.
HALF_ULP_BF16 = 2.0**-9
_LOG2E = np.float32(1.4426950408889634)


def every_bf16(limit: float) -> np.ndarray:
    """All bf16 numbers up to ±limit, as fp32: the gates that a kernel can meet."""
    x = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    return x[np.abs(x) <= limit]


def emulated(x: np.ndarray, ex2: float, rcp: float) -> np.ndarray:
    """The kernel's four steps; ex2 and rcp are the relative errors that the approximate functions make."""
    with np.errstate(over="ignore", divide="ignore"):
        power = (np.exp2((-x * _LOG2E).astype(np.float64)) * (1 + ex2)).astype(np.float32)
        result = (1 / (np.float32(1) + power).astype(np.float64) * (1 + rcp)).astype(np.float32)
    return np.where(np.abs(result) < np.finfo(np.float32).tiny, np.float32(0), result)


def exact(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def bound(x: np.ndarray) -> np.ndarray:
    """Relative error of `emulated`.

    −log2(e)·x is rounded once, and log2(e) itself: 2^-23·log2(e)·|x| in the exponent, ln 2 times that in the power. The power's
    error reaches the result in full where it dominates 1 + power (negative x) and is 1 − s of it in general.
    """
    share = 1 - exact(x)
    return 1.01 * (share * (EX2 + ROUNDING + 2 * ROUNDING * np.abs(x.astype(np.float64))) + ROUNDING + RCP + ROUNDING)


@pytest.mark.parametrize("ex2", [-EX2, EX2])
@pytest.mark.parametrize("rcp", [-RCP, RCP])
def test_sigmoid_is_near_fp32_over_every_bf16_gate(ex2: float, rcp: float) -> None:
    x = every_bf16(87)
    error = np.abs(emulated(x, ex2, rcp) / exact(x) - 1)
    assert (error <= bound(x)).all(), x[np.argmax(error / bound(x))]
    # The activation's error stays 2^7 below that of its rounding to bf16, in the negative tail too.
    assert bound(x).max() < HALF_ULP_BF16 / 128
    assert bound(x[x >= -20]).max() < HALF_ULP_BF16 / 512


@pytest.mark.parametrize("ex2", [-EX2, EX2])
@pytest.mark.parametrize("rcp", [-RCP, RCP])
def test_slope_of_silu(ex2: float, rcp: float) -> None:
    """s + silu·(1 − s), the backward's factor: it crosses zero at −1.28; 1 − s cancels for large gates."""
    x = every_bf16(20)
    gate = x.astype(np.float64)
    s, right = emulated(x, ex2, rcp).astype(np.float64), exact(x)
    slope, want = s + gate * s * (1 - s), right + gate * right * (1 - right)
    # d(slope)/ds = 1 + x·(1 − 2s)
    allowed = np.abs(1 + gate * (1 - 2 * right)) * bound(x) * right + 1e-9 * right
    assert (np.abs(slope - want) <= 1.01 * allowed).all()
    # No term of it is off by more than 1/64 of its rounding to bf16.
    assert (allowed <= HALF_ULP_BF16 / 64 * (right + np.abs(gate) * right * np.maximum(1 - right, 2.0**-8))).all()


def test_tanh_would_not_do() -> None:
    """0.5·tanh.approx(x/2) + 0.5 with the manual's 2^-11: right for positive gates, wrong by more than all of it at −8."""
    for error in (-(2.0**-11), 2.0**-11):
        x = np.float32(-8.0)
        got = 0.5 * np.tanh(0.5 * float(x)) * (1 + error) + 0.5
        assert abs(got / exact(x) - 1) > 100 * HALF_ULP_BF16


@pytest.mark.filterwarnings("ignore:overflow")
def test_limits() -> None:
    x = np.array([-np.inf, -104.0, -88.0, 0.0, 88.0, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(emulated(x, 0.0, 0.0), np.array([0, 0, 0, 0.5, 1, 1, np.nan], np.float32))


def test_the_kernel_computes_what_is_emulated() -> None:
    """The emulation's steps and constants are those of the assembly."""
    text = moe_mlp_triton._SIGMOID.value
    steps = re.findall(r"(\w+)(?:\.approx|\.rn)?\.ftz\.f32", text)
    assert steps == ["mul", "ex2", "add", "rcp"]
    constants = [np.array([int(digits, 16)], np.uint32).view(np.float32)[0] for digits in re.findall(r"0f([0-9A-F]{8})", text)]
    assert constants == [-_LOG2E, np.float32(1)]
