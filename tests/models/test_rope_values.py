"""Rotary embedding against complex numbers and transformers' Llama.

Shape suffixes: B sequences, S positions, H heads, C head_dim.
"""

import cmath

import pytest
import torch

from megagrin.nn.rope import rope_table, rotate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_turn_as_complex_numbers(dtype: torch.dtype) -> None:
    """RoFormer, eq. 34: (x_i, x_{i+C/2}) as one complex number times e^{i·m·θ^(−2i/C)}."""
    head_dim, theta, positions = 6, 100.0, [[0, 1, 5], [7, 0, 40]]
    cos, sin = rope_table(torch.tensor(positions), head_dim, theta, dtype)
    assert cos.shape == sin.shape == (2, 1, 3, 3)
    assert cos.dtype == sin.dtype == dtype
    x_BHSC = torch.randn(2, 4, 3, head_dim, dtype=dtype, generator=torch.Generator().manual_seed(1))
    got_BHSC = rotate(x_BHSC, cos, sin)
    assert got_BHSC.dtype == dtype
    for b in range(2):
        for s, position in enumerate(positions[b]):
            for i in range(head_dim // 2):
                turn = cmath.exp(1j * position * theta ** (-2 * i / head_dim))
                for h in range(4):
                    pair = complex(x_BHSC[b, h, s, i], x_BHSC[b, h, s, i + head_dim // 2]) * turn
                    # the frequencies themselves are fp32 in every dtype, as in the released model
                    assert got_BHSC[b, h, s, i].item() == pytest.approx(pair.real, abs=2e-5)
                    assert got_BHSC[b, h, s, i + head_dim // 2].item() == pytest.approx(pair.imag, abs=2e-5)


def test_narrow_states_are_turned_in_the_tables_dtype() -> None:
    """bf16 states, fp32 table: one rounding at the end, as transformers' fp32 rotation cast down."""
    cos, sin = rope_table(torch.arange(64).unsqueeze(0), 8, 10000.0, torch.float32)
    x_BHSC = torch.randn(1, 2, 64, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    got_BHSC = rotate(x_BHSC, cos, sin)
    assert got_BHSC.dtype == torch.bfloat16
    assert torch.equal(got_BHSC, rotate(x_BHSC.float(), cos, sin).bfloat16())


def test_frequencies_are_fp32_even_in_an_fp64_table() -> None:
    """The angle of the fp32 frequency, bit by bit: two dtypes of one model have one position code."""
    import numpy as np

    positions = np.array([1, 3, 4095])
    exponent = np.arange(0, 10, 2, dtype=np.float32) / np.float32(10)
    cos, _ = rope_table(torch.from_numpy(positions).unsqueeze(0), 10, 500.0, torch.float64)
    frequency = (1.0 / torch.tensor(500.0) ** torch.from_numpy(exponent)).numpy().astype(np.float64)
    np.testing.assert_allclose(cos[0, 0].numpy(), np.cos(positions[:, None] * frequency[None]), rtol=0, atol=2e-3)


def test_is_transformers_rotation() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    cos, sin = rope_table(torch.arange(20).unsqueeze(0), 8, 10000.0, torch.float32)
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(2, 3, 20, 8, generator=generator) for _ in range(2))
    doubled = [torch.cat((table, table), -1)[:, 0] for table in (cos, sin)]
    theirs = llama.apply_rotary_pos_emb(q, k, *doubled)
    torch.testing.assert_close((rotate(q, cos, sin), rotate(k, cos, sin)), theirs)
