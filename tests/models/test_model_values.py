"""Published dimensions of the presets, borders of the model's settings, and settings that must reach the computation."""

from dataclasses import replace

import pytest
import torch

from megagrin.models.grin import PRESETS
from megagrin.models.init import init_parameters
from megagrin.models.transformer import ModelConfig, Part, Transformer

TINY = ModelConfig(
    vocab_size=11,
    n_layers=2,
    d_model=8,
    n_heads=2,
    n_kv_heads=1,
    head_dim=4,
    d_ff=6,
    n_experts=3,
    top_k=2,
    max_positions=16,
    window=16,
)


def test_a_model_without_settings_routes_to_two_of_sixteen() -> None:
    """As the paper's title says, in small."""
    config = ModelConfig()
    assert (config.n_experts, config.top_k, config.norm_eps, config.init_std) == (16, 2, 1e-5, 0.02)


def test_the_large_preset_has_phimoes_dimensions() -> None:
    """GRIN-MoE and Phi-3.5-MoE share them (arXiv 2409.12136, Table 1); transformers has them as its own defaults."""
    phimoe = pytest.importorskip("transformers").PhimoeConfig()
    grin = PRESETS["grin_16x3_8b"]
    assert (grin.vocab_size, grin.n_layers, grin.d_model) == (phimoe.vocab_size, phimoe.num_hidden_layers, phimoe.hidden_size)
    assert (grin.n_heads, grin.n_kv_heads) == (phimoe.num_attention_heads, phimoe.num_key_value_heads)
    assert grin.head_dim == phimoe.hidden_size // phimoe.num_attention_heads
    assert (grin.d_ff, grin.n_experts, grin.top_k) == (
        phimoe.intermediate_size, phimoe.num_local_experts, phimoe.num_experts_per_tok
    )  # fmt: skip
    assert (grin.norm_eps, grin.init_std) == (phimoe.rms_norm_eps, phimoe.initializer_range)
    # GRIN-MoE's released configuration: trained on 4096 positions, a window of 2048 keys, θ = 10000, biases everywhere.
    assert (grin.max_positions, grin.window, grin.rope_theta) == (4096, 2048, 10000.0)
    assert grin.attention_bias
    assert grin.lm_head_bias


def test_the_small_preset_keeps_head_size_grouping_and_window() -> None:
    large, small = PRESETS["grin_16x3_8b"], PRESETS["grin_16x0_9b"]
    assert small.head_dim == large.head_dim
    assert small.n_heads // small.n_kv_heads == large.n_heads // large.n_kv_heads
    assert small.n_heads * small.head_dim == small.d_model
    assert small.n_kv_heads == 4
    for field in ("vocab_size", "n_experts", "top_k", "max_positions", "window", "rope_theta"):
        assert getattr(small, field) == getattr(large, field), field


@pytest.mark.parametrize(
    ("moe", "dense"), [("grin_16x3_8b", "dense_6_6b"), ("grin_16x0_9b", "dense_1_6b"), ("grin_tiny", "dense_tiny")]
)
def test_a_dense_twin_differs_in_the_experts_alone(moe: str, dense: str) -> None:
    grin = PRESETS[moe]
    assert PRESETS[dense] == replace(grin, preset=dense, n_experts=0, top_k=1, d_ff=2 * grin.d_ff)


@pytest.mark.parametrize(
    "field", ["vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_positions", "window"]
)
def test_sizes_start_at_one(field: str) -> None:
    for value in (0, -2):
        assert f"model.{field}: {value} must be at least 1" in replace(TINY, **{field: value}).violations()
    ones = ModelConfig(
        vocab_size=1, n_layers=1, d_model=1, n_heads=1, n_kv_heads=1, head_dim=2, d_ff=1, max_positions=1, window=1
    )
    assert ones.violations() == []


def test_borders_of_experts_and_heads() -> None:
    assert replace(TINY, top_k=3).violations() == []
    assert replace(TINY, top_k=1).violations() == []
    for top_k in (0, 4):
        assert replace(TINY, top_k=top_k).violations() == [f"model.top_k: {top_k} must lie in [1, model.n_experts = 3]"]
    assert replace(TINY, n_experts=0, top_k=7).violations() == []  # a dense model has no choice to make
    assert replace(TINY, n_experts=1, top_k=1).is_moe
    assert not replace(TINY, n_experts=0).is_moe
    assert replace(TINY, n_heads=3, n_kv_heads=3).violations() == []
    assert replace(TINY, n_heads=3, n_kv_heads=2).violations() == ["model.n_heads: 3 must be a multiple of model.n_kv_heads (2)"]
    assert replace(TINY, n_kv_heads=0).violations() == ["model.n_kv_heads: 0 must be at least 1"]


def build(config: ModelConfig = TINY, part: Part | None = None) -> Transformer:
    model = Transformer(config, part=part)
    init_parameters(model, config, seed=1)
    return model.double()


def test_norm_eps_reaches_every_norm() -> None:
    """(x − mean) / √(var + ε): with a large ε the output is smaller by the written-out factor."""
    model = build(replace(TINY, norm_eps=0.5))
    x_BSD = torch.randn(1, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centred = x_BSD - x_BSD.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.5).sqrt()
    norms = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    assert sorted(norms) == [
        "final_norm",
        *(f"layers.{layer}.{name}" for layer in range(2) for name in ("attention_norm", "mlp_norm")),
    ]
    for name, norm in norms.items():
        torch.testing.assert_close(norm(x_BSD), expected, msg=name)


@torch.no_grad()
def test_theta_window_and_bias_switches_reach_the_computation() -> None:
    tokens_BS = torch.arange(10).unsqueeze(0)
    base = build(replace(TINY, init_std=1.0))(tokens_BS).logits_BSV
    for change in ({"rope_theta": 100.0}, {"window": 3}):
        other = build(replace(TINY, init_std=1.0, **change))(tokens_BS).logits_BSV
        assert (other[:, -1] - base[:, -1]).abs().max() > 1e-4, change
    with_bias = {name for name, _ in build().named_parameters() if name.endswith("proj.bias")}
    assert with_bias == {f"layers.{layer}.attention.{name}_proj.bias" for layer in range(2) for name in "qkvo"}
    assert build(replace(TINY, lm_head_bias=False)).lm_head.bias is None


@torch.no_grad()
def test_the_blocks_are_the_written_out_sum() -> None:
    """x + attention(norm(x)), then x + mlp(norm(x)), then the final norm and W·x + b."""
    model = build(replace(TINY, n_experts=0, top_k=1, init_std=0.5))
    model.lm_head.bias.copy_(torch.arange(11))
    tokens_BS = torch.tensor([[3, 1, 4, 1, 5]])
    from megagrin.nn.rope import rope_table

    rope = rope_table(torch.arange(5).unsqueeze(0), 4, 10000.0, torch.float64)
    mask = model.attention_mask(5, 0, None, torch.device("cpu"))
    x_BSD = model.embed.weight[tokens_BS]
    for layer in model.layers:
        x_BSD = x_BSD + layer.attention(layer.attention_norm(x_BSD), rope, mask, None)
        h_BSD = layer.mlp_norm(x_BSD)
        gate, up, down = (getattr(layer.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
        g_BSF = h_BSD @ gate.T
        x_BSD = x_BSD + (g_BSF / (1 + (-g_BSF).exp()) * (h_BSD @ up.T)) @ down.T
    expected = model.final_norm(x_BSD) @ model.lm_head.weight.T + torch.arange(11)
    out = model(tokens_BS)
    torch.testing.assert_close(out.logits_BSV, expected)
    assert out.stats is None
    assert out.loss_sum is None


@torch.no_grad()
def test_parts_one_after_the_other_are_the_whole() -> None:
    """What a pipeline holds, without one: hidden states go on, statistics lie in the rows of their layers."""
    tokens_BS = torch.arange(10).view(2, 5)
    whole = build()
    out = whole(tokens_BS)
    first, last = build(part=Part(range(1), head=False)), build(part=Part(range(1, 2), embed=False))
    assert sorted({*first.state_dict(), *last.state_dict()}) == sorted(whole.state_dict())
    assert not set(first.state_dict()) & set(last.state_dict())
    middle = first(tokens_BS)
    assert middle.logits_BSV is None
    assert middle.loss_sum is None
    end = last(tokens_BS, hidden_BSD=middle.hidden_BSD)
    assert end.hidden_BSD is None
    torch.testing.assert_close(end.logits_BSV, out.logits_BSV)
    for name in ("counts_LE", "prob_sum_LE", "z_sum_L"):
        a, b, both = (getattr(stats, name) for stats in (middle.stats, end.stats, out.stats))
        assert a.dtype == b.dtype == both.dtype
        assert not a[1].any()
        assert not b[0].any()
        torch.testing.assert_close(torch.stack([a[0], b[1]]), both)
    assert out.stats.counts_LE.sum(1).tolist() == [20, 20]  # 10 tokens, two experts each
    torch.testing.assert_close(out.stats.prob_sum_LE.sum(1), torch.full((2,), 10.0, dtype=torch.float64))
