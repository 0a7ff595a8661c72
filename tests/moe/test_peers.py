"""Two independent implementations as oracles: the same weights and tokens give the same loss and the same gradients.

transformers' phimoe checks the MoE model with deterministic routing, Megatron-Core's GPTModel the dense twin. That every
parallel layout equals our single process is shown in tests/parallel.

Shape suffixes: B sequences, S positions, G key-value groups, Q query heads of a group, C head_dim, D model width.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import GlooPool
from hf_models import BASE, random_model
from torch import Tensor

from megagrin.hf.mapping import hf_views, to_hf_config
from megagrin.models.transformer import Transformer

DENSE = replace(
    BASE,
    n_experts=0,
    top_k=1,
    d_model=48,
    n_heads=6,
    n_kv_heads=3,
    head_dim=8,
    attention_bias=False,
    lm_head_bias=False,
    window=64,
)


def _tokens(vocab_size: int, sequence: int) -> Tensor:
    return torch.randint(vocab_size, (3, sequence + 1), generator=torch.Generator().manual_seed(1))


def _our_step(model: Transformer, tokens_BS: Tensor) -> tuple[float, Transformer]:
    """Mean loss, and the model with its gradients in the place of its weights."""
    output = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
    loss = output.loss_sum / tokens_BS[:, 1:].numel()
    loss.backward()
    gradients = copy.deepcopy(model)
    for held, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
        held.data = parameter.grad
    return loss.item(), gradients


def _fused(model: Transformer) -> dict[str, Tensor]:
    """Copies under transformers' names; gates and ups, whose view is (E, 2, F, D), in one dimension."""
    return {name: (view.flatten(1, 2) if view.dim() == 4 else view).clone() for name, view in hf_views(model, "fused")}


def _assert_close(theirs: dict[str, Tensor], ours: dict[str, Tensor], tolerance: float) -> None:
    assert theirs.keys() == ours.keys()
    for name, gradient in ours.items():
        # A key bias has no gradient but rounding: softmax ignores a constant.
        scale = ours[name.replace("k_proj.bias", "q_proj.bias")].norm()
        assert (theirs[name] - gradient).norm() <= tolerance * scale, name


def test_phimoe_trains_alike() -> None:
    """Loss and every gradient of transformers' phimoe in eval mode, routing by the largest logits, fp32."""
    transformers = pytest.importorskip("transformers")
    ours = random_model()
    router = ours.layers[0].moe.router.config
    config = transformers.PhimoeConfig(**to_hf_config(ours.config, router, bos_id=1, eos_id=2, dtype="float32"))
    theirs = transformers.PhimoeForCausalLM(config).eval()
    theirs.set_experts_implementation("eager")
    theirs.load_state_dict(_fused(ours))
    tokens_BS = _tokens(ours.config.vocab_size, 40)
    loss, gradients = _our_step(ours, tokens_BS)
    logits_BSV = theirs(tokens_BS[:, :-1], use_cache=False).logits
    their_loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten())
    their_loss.backward()
    assert loss == pytest.approx(their_loss.item(), rel=1e-6)
    named = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    _assert_close(named, _fused(gradients), 2e-5)


def _megatron_model(patch: Callable[[Any, str, Any], None]) -> torch.nn.Module:
    """Megatron-Core's GPTModel of the same shape, on the CPU."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    # Megatron-Core asks CUDA for the current device and keeps dropout's random state there: neither matters here.
    patch(torch.cuda, "current_device", lambda: "cpu")
    patch(tensor_parallel.get_cuda_rng_tracker(), "fork", lambda *_: contextlib.nullcontext())
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    config = TransformerConfig(
        num_layers=DENSE.n_layers,
        hidden_size=DENSE.d_model,
        num_attention_heads=DENSE.n_heads,
        num_query_groups=DENSE.n_kv_heads,
        kv_channels=DENSE.head_dim,
        ffn_hidden_size=DENSE.d_ff,
        layernorm_epsilon=DENSE.norm_eps,
        use_cpu_initialization=True,
        normalization="LayerNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=torch.float32,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="LayerNorm"),
        vocab_size=DENSE.vocab_size,
        max_sequence_length=DENSE.max_positions,
        position_embedding_type="rope",
        rotary_base=int(DENSE.rope_theta),
        share_embeddings_and_output_weights=False,
    )


def _megatron_names(model: Transformer) -> dict[str, Tensor]:
    """Our tensors under Megatron-Core's names: q, k, v by key-value group in one matrix, gate above up in another."""
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    names = {
        "embedding.word_embeddings.weight": ours["embed.weight"],
        "decoder.final_layernorm.weight": ours["final_norm.weight"],
        "decoder.final_layernorm.bias": ours["final_norm.bias"],
        "output_layer.weight": ours["lm_head.weight"],
    }
    for layer in range(DENSE.n_layers):
        here, there = f"layers.{layer}", f"decoder.layers.{layer}"
        q_GQCD = ours[f"{here}.attention.q_proj.weight"].view(DENSE.n_kv_heads, -1, DENSE.d_model)
        k_GCD, v_GCD = (ours[f"{here}.attention.{name}_proj.weight"].view(DENSE.n_kv_heads, -1, DENSE.d_model) for name in "kv")
        names[f"{there}.self_attention.linear_qkv.weight"] = torch.cat((q_GQCD, k_GCD, v_GCD), dim=1).flatten(0, 1)
        names[f"{there}.self_attention.linear_proj.weight"] = ours[f"{here}.attention.o_proj.weight"]
        gate_up = [ours[f"{here}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        names[f"{there}.mlp.linear_fc1.weight"] = torch.cat(gate_up)
        names[f"{there}.mlp.linear_fc2.weight"] = ours[f"{here}.mlp.down_proj.weight"]
        for kind in ("weight", "bias"):
            names[f"{there}.input_layernorm.{kind}"] = ours[f"{here}.attention_norm.{kind}"]
            names[f"{there}.pre_mlp_layernorm.{kind}"] = ours[f"{here}.mlp_norm.{kind}"]
    return names


def megatron_step() -> tuple[float, float, dict[str, Tensor], dict[str, Tensor]]:
    """Their loss, ours, their gradients, ours under their names; in a process with a group of its own."""
    from megatron.core import parallel_state

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as at_end:
        warnings.simplefilter("ignore")
        at_end.callback(parallel_state.destroy_model_parallel)
        theirs = _megatron_model(patch.setattr)
        torch.manual_seed(0)
        ours = random_model(DENSE)
        with torch.no_grad():
            for name, weight in _megatron_names(ours).items():
                theirs.get_parameter(name).copy_(weight)
        assert len(_megatron_names(ours)) == len(list(theirs.parameters()))
        tokens_BS = _tokens(DENSE.vocab_size, 40)
        future_SS = torch.ones(40, 40, dtype=torch.bool).triu(1)
        their_loss = theirs(
            tokens_BS[:, :-1], torch.arange(40).expand(3, 40), future_SS[None, None], labels=tokens_BS[:, 1:]
        ).mean()
        their_loss.backward()
        loss, gradients = _our_step(ours, tokens_BS)
        return (
            their_loss.item(),
            loss,
            {name: parameter.grad.clone() for name, parameter in theirs.named_parameters()},
            _megatron_names(gradients),
        )


def test_megatron_core_trains_alike(gloo: GlooPool) -> None:
    """Loss and every gradient of Megatron-Core's GPTModel with the dense twin's weights, fp32."""
    pytest.importorskip("megatron.core", exc_type=ImportError)
    their_loss, loss, theirs, ours = gloo.run(1, megatron_step)[0]
    assert not dist.is_initialized()
    assert loss == pytest.approx(their_loss, rel=1e-6)
    _assert_close(theirs, ours, 2e-5)
