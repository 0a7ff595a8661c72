"""FLOPs per token against torch's own counter on a transformer built here by hand, and the peaks of devices.

Shape suffixes: B = batch, S = sequence, H = heads, D = model width, K = head width, T = tokens of one expert.
"""

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megagrin.models.transformer import ModelConfig
from megagrin.observe.metrics import MetricsConfig
from megagrin.planning.flops import (
    flops_per_token,
    forward_flops_per_token,
    listed_peak_flops,
    measured_peak_flops,
    model_flops_utilization,
    peak_flops,
)

GRIN_42B = {
    "n_layers": 32,
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 8,
    "head_dim": 128,
    "d_ff": 6400,
    "n_experts": 16,
    "top_k": 2,
    "vocab_size": 32064,
    "seq_len": 4096,
    "window": 2048,
}
SMALL = {
    "n_layers": 2,
    "d_model": 24,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 10,
    "d_ff": 20,
    "n_experts": 5,
    "top_k": 2,
    "vocab_size": 33,
    "seq_len": 12,
    "window": 5,
}


class Block(nn.Module):
    """Attention over all S × S pairs with a mask, then SwiGLU experts one by one: every product in sight."""

    def __init__(self, shape: dict[str, int]) -> None:
        super().__init__()
        self.shape = shape
        d_model, width = shape["d_model"], shape["head_dim"]
        self.q = nn.Linear(d_model, shape["n_heads"] * width)
        self.k = nn.Linear(d_model, shape["n_kv_heads"] * width)
        self.v = nn.Linear(d_model, shape["n_kv_heads"] * width)
        self.o = nn.Linear(shape["n_heads"] * width, d_model)
        self.router = nn.Linear(d_model, shape["n_experts"], bias=False) if shape["n_experts"] else None
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    "gate": nn.Linear(d_model, shape["d_ff"], bias=False),
                    "up": nn.Linear(d_model, shape["d_ff"], bias=False),
                    "down": nn.Linear(shape["d_ff"], d_model, bias=False),
                }
            )
            for _ in range(max(shape["n_experts"], 1))
        )

    def attend(self, x_BSD: Tensor, allowed_SS: Tensor) -> Tensor:
        batch, seq, _ = x_BSD.shape
        heads, kv_heads, width = self.shape["n_heads"], self.shape["n_kv_heads"], self.shape["head_dim"]
        q_BHSK = self.q(x_BSD).view(batch, seq, heads, width).transpose(1, 2)
        k_BHSK = self.k(x_BSD).view(batch, seq, kv_heads, width).transpose(1, 2).repeat_interleave(heads // kv_heads, dim=1)
        v_BHSK = self.v(x_BSD).view(batch, seq, kv_heads, width).transpose(1, 2).repeat_interleave(heads // kv_heads, dim=1)
        scores_BHSS = (q_BHSK @ k_BHSK.transpose(2, 3)).masked_fill(~allowed_SS, float("-inf"))
        return self.o((scores_BHSS.softmax(-1) @ v_BHSK).transpose(1, 2).reshape(batch, seq, heads * width))

    def feed_forward(self, x_ND: Tensor) -> Tensor:
        if self.router is None:
            chosen = torch.zeros(len(x_ND), 1, dtype=torch.long)
            weight = torch.ones(len(x_ND), 1)
        else:
            weight, chosen = self.router(x_ND).softmax(-1).topk(self.shape["top_k"])
        out_ND = torch.zeros_like(x_ND)
        for number, expert in enumerate(self.experts):
            token_T, round_T = (chosen == number).nonzero(as_tuple=True)
            x_TD = x_ND[token_T]
            y_TD = expert["down"](nn.functional.silu(expert["gate"](x_TD)) * expert["up"](x_TD))
            out_ND = out_ND.index_add(0, token_T, y_TD * weight[token_T, round_T].unsqueeze(1))
        return out_ND

    def forward(self, x_BSD: Tensor, allowed_SS: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attend(x_BSD, allowed_SS)
        return x_BSD + self.feed_forward(x_BSD.flatten(0, 1)).view_as(x_BSD)


def allowed_pairs(seq_len: int, window: int) -> Tensor:
    query, key = torch.arange(seq_len).unsqueeze(1), torch.arange(seq_len).unsqueeze(0)
    return (key <= query) & (query - key < window)


def model_and_length(shape: dict[str, int]) -> tuple[ModelConfig, int]:
    """The arguments of the functions under test."""
    fields = {name: value for name, value in shape.items() if name != "seq_len"}
    return ModelConfig(**fields), shape["seq_len"]


def counted_training_flops(shape: dict[str, int], batch: int) -> int:
    torch.manual_seed(0)
    embedding = nn.Embedding(shape["vocab_size"], shape["d_model"])
    blocks = [Block(shape) for _ in range(shape["n_layers"])]
    head = nn.Linear(shape["d_model"], shape["vocab_size"])
    tokens_BS = torch.randint(shape["vocab_size"], (batch, shape["seq_len"]))
    with FlopCounterMode(display=False) as counter:
        x_BSD = embedding(tokens_BS)
        for block in blocks:
            x_BSD = block(x_BSD, allowed_pairs(shape["seq_len"], shape["window"]))
        nn.functional.cross_entropy(head(x_BSD).flatten(0, 1), tokens_BS.flatten()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "shape",
    [
        SMALL,
        SMALL | {"n_experts": 0, "window": 12},
        SMALL | {"n_experts": 1, "top_k": 1},
        SMALL | {"n_kv_heads": 4, "top_k": 5, "window": 40},
    ],
    ids=["moe", "dense", "one-expert", "every-expert"],
)
def test_flops_agree_with_torch_counter(shape: dict[str, int]) -> None:
    batch = 3
    tokens = batch * shape["seq_len"]
    terms = forward_flops_per_token(*model_and_length(shape))
    # The counter sees the products of the core over all S × S pairs, masked or not; all other terms must agree exactly.
    all_pairs = shape["n_layers"] * 4 * shape["n_heads"] * shape["head_dim"] * shape["seq_len"]
    expected = 3 * tokens * (sum(terms.values()) - terms["attention_core"] + all_pairs)
    assert counted_training_flops(shape, batch) == round(expected)
    assert flops_per_token(*model_and_length(shape)) == pytest.approx(3 * sum(terms.values()), rel=1e-15)


@pytest.mark.parametrize("window", [1, 2, 5, 11, 12, 13])
def test_attention_core_counts_the_attended_pairs(window: int) -> None:
    shape = SMALL | {"window": window}
    pairs = int(allowed_pairs(shape["seq_len"], window).sum())
    expected = shape["n_layers"] * 4 * shape["n_heads"] * shape["head_dim"] * pairs
    assert forward_flops_per_token(*model_and_length(shape))["attention_core"] * shape["seq_len"] == pytest.approx(
        expected, rel=1e-15
    )


def test_grin_takes_six_flops_per_active_parameter_and_the_core() -> None:
    terms = forward_flops_per_token(*model_and_length(GRIN_42B))
    parameters = sum(value for name, value in terms.items() if name != "attention_core") / 2
    # 6.6B active (Table 1 of the paper) with the embedding's 0.13B, which costs no FLOPs.
    assert parameters + 32064 * 4096 == pytest.approx(6.6e9, rel=0.01)


def test_mfu_of_a_known_case() -> None:
    # 1000 tokens/s of 1 GFLOP each on two devices of 1 TFLOP/s: half of what they can.
    assert model_flops_utilization(1000.0, 1e9, devices=2, device_peak=1e12) == 0.5


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989.5),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756.5),
        ("NVIDIA H100 NVL", torch.float16, False, 835.5),
        ("NVIDIA H200", torch.float32, True, 494.5),
        ("NVIDIA H200", torch.float32, False, 67.0),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, False, 312.0),
        ("NVIDIA A100-PCIE-40GB", torch.float32, True, 156.0),
        ("NVIDIA B200", torch.bfloat16, False, 2250.0),
        ("NVIDIA GB200", torch.bfloat16, False, 2500.0),
        ("NVIDIA L40S", torch.bfloat16, False, 362.0),
        ("AMD Instinct MI300X", torch.bfloat16, False, 1307.4),
        ("Tesla V100-SXM2-32GB", torch.float16, False, 125.0),
        ("Tesla V100-PCIE-16GB", torch.float32, True, 14.0),
    ],
)
def test_listed_peaks(name: str, dtype: torch.dtype, tf32: bool, tflops: float) -> None:
    assert listed_peak_flops(name, dtype, tf32) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA GeForce RTX 4090", torch.bfloat16),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", torch.bfloat16),
        ("Tesla V100-SXM2-32GB", torch.bfloat16),
        ("NVIDIA H100 80GB HBM3", torch.float64),
    ],
)
def test_peaks_that_are_not_listed(name: str, dtype: torch.dtype) -> None:
    assert listed_peak_flops(name, dtype) is None


def test_unknown_device_is_measured_once_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    measured_peak_flops.cache_clear()
    with caplog.at_level(logging.WARNING):
        first = peak_flops("cpu", torch.float32)
        assert peak_flops(torch.device("cpu"), torch.float32) == first
    assert first > 0
    assert [record.name for record in caplog.records] == ["megagrin.planning.flops"]
    assert "metrics.peak_tflops" in caplog.text


def test_configured_peak_comes_first() -> None:
    assert peak_flops("cpu", torch.float32, MetricsConfig(peak_tflops=1.5).peak_tflops) == 1.5e12
