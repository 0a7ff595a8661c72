"""Configuration fields and tensor names: what is mapped, and what is refused with all its faults."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hf_models import BASE, ROUTER, random_model
from transformers import PhimoeConfig

from megagrin.hf.mapping import Layout, from_hf_config, hf_views, stored_shape, to_hf_config
from megagrin.moe.router import RouterConfig


@pytest.mark.parametrize("layout", ["released", "fused"])
def test_views_cover_every_weight_once(layout: Layout) -> None:
    model = random_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for _, view in hf_views(model, layout):
        view.add_(1.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] + 1.0), name


@pytest.mark.parametrize(
    ("model", "router", "fields"),
    [
        ({"top_k": 1}, {}, ["model.top_k: 1"]),
        ({"top_k": 3}, {"kind": "gshard"}, ["model.top_k: 3", "router.kind: gshard"]),
        (
            {},
            {"kind": "sparsemixer_v2_star", "mask_rule": "paper"},
            ["router.kind: sparsemixer_v2_star", "router.mask_rule: paper"],
        ),
        ({}, {"forced_balance": True}, ["router.forced_balance"]),
        ({"n_experts": 0, "top_k": 1}, {}, ["model.n_experts: 0"]),
    ],
)
def test_export_refuses_what_transformers_cannot_compute(
    model: dict[str, Any], router: dict[str, Any], fields: list[str]
) -> None:
    with pytest.raises(ValueError, match="phimoe") as error:
        to_hf_config(replace(BASE, **model), RouterConfig(**router), bos_id=1, eos_id=2, dtype="float32")
    assert all(field in str(error.value) for field in fields)
    assert str(error.value).count("transformers' phimoe") == len(fields)


_GOOD = to_hf_config(BASE, ROUTER, bos_id=1, eos_id=2, dtype="float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type: 'mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok: 4"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type: 'longrope'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_type: 'linear'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
        ({"rope_parameters": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ({"rope_parameters": None, "rope_theta": -1}, "rope_theta: -1"),
        ({"rope_parameters": [1]}, "rope_parameters: [1] has a wrong type"),
        ({"hidden_size": 61}, "hidden_size: 61 must be a multiple of num_attention_heads"),
        ({"head_dim": 9}, "model.head_dim: 9 must be even"),
        ({"vocab_size": None}, "vocab_size: missing"),
        ({"intermediate_size": "37"}, "intermediate_size: '37' has a wrong type"),
        ({"num_hidden_layers": True}, "num_hidden_layers: True has a wrong type"),
        ({"attention_bias": 1}, "attention_bias: 1 has a wrong type"),
        ({"router_jitter_noise": 0.0}, "router.mask_eps: 0.0"),
    ],
)
def test_import_refuses_configuration(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        from_hf_config(_GOOD | change)
    assert message in str(error.value)
    assert "\n" not in str(error.value), "one fault, one line"


def test_import_lists_every_fault() -> None:
    with pytest.raises(ValueError, match="3 settings") as error:
        from_hf_config(_GOOD | {"hidden_act": "gelu", "tie_word_embeddings": True, "vocab_size": "x"})
    assert str(error.value).count("config.json: ") == 3


def test_import_of_an_old_configuration() -> None:
    """transformers 4 names: rope_theta at the top; absent and null fields take PhimoeConfig's defaults."""
    needed = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
    old = {key: _GOOD[key] for key in needed} | {
        "model_type": "phimoe",
        "sliding_window": None,
        "rope_scaling": None,
        "head_dim": None,
    }
    model, router = from_hf_config(old)
    reference = PhimoeConfig(**{key: _GOOD[key] for key in needed})
    assert (model.n_experts, model.rope_theta) == (reference.num_local_experts, reference.rope_parameters["rope_theta"])
    assert (model.window, model.head_dim, model.n_kv_heads) == (64, 10, 6)
    assert (model.norm_eps, router.mask_eps) == (reference.rms_norm_eps, reference.router_jitter_noise)
    assert (model.attention_bias, model.lm_head_bias) == (reference.attention_bias, reference.lm_head_bias)
    assert from_hf_config(old | {"rope_theta": 10000})[0].rope_theta == 10000.0


@pytest.mark.parametrize("layout", ["released", "fused"])
def test_gates_and_ups_part(layout: Layout) -> None:
    """Rows of gate_up_proj are interleaved; a checkpoint holds all gates, then all ups."""
    model = random_model()
    stored = {name: view.reshape(stored_shape(view)) for name, view in hf_views(model, layout)}
    gate_up = model.layers[1].moe.experts.gate_up_proj.detach()
    if layout == "fused":
        together = stored["model.layers.1.mlp.experts.gate_up_proj"]
        assert together.shape == gate_up.shape
        gates, ups = together[2].chunk(2)
    else:
        gates, ups = (stored[f"model.layers.1.block_sparse_moe.experts.2.{matrix}.weight"] for matrix in ("w1", "w3"))
    assert torch.equal(gates, gate_up[2, 0::2])
    assert torch.equal(ups, gate_up[2, 1::2])
