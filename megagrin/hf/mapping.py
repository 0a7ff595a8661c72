"""Correspondence between a megagrin model and transformers' `PhimoeForCausalLM`: configuration fields and tensor names.

Pure functions: nothing here reads a file or needs transformers. One table of views serves both directions, so that what an
export writes is what an import fills.

Two layouts are in use. `released`: experts one by one, `block_sparse_moe.experts.{i}.w1|w3|w2` and `block_sparse_moe.gate`, as in
the published checkpoints; every version of transformers reads it. `fused`: `mlp.experts.gate_up_proj|down_proj` and `mlp.router`,
the modules of transformers 5 itself.

Shape suffixes: E experts, F expert width, D model width.
"""

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor

from megagrin.models.transformer import ModelConfig, Transformer
from megagrin.moe.router import RouterConfig
from megagrin.settings import config

Layout = Literal["released", "fused"]

# transformers' routine always runs two rounds, whatever num_experts_per_tok says.
_TOP_K = 2
# "grinmoe" is accepted on the assumption that microsoft/GRIN-MoE names itself so (not verified); separators are ignored.
_MODEL_TYPES = ("phimoe", "grinmoe")

_RENAMED = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "mlp_norm": "post_attention_layernorm",
}


def _router_violations(model: ModelConfig, router: RouterConfig) -> list[str]:
    """Why transformers' inference routing would differ from this model's."""
    broken = []
    if model.top_k != _TOP_K:
        broken.append(f"model.top_k: {model.top_k} must be {_TOP_K}, the only number that transformers' phimoe routes to")
    if router.kind != "sparsemixer_v2":
        broken.append(f"router.kind: {router.kind} must be sparsemixer_v2; transformers' phimoe weighs experts by its softmax")
    if router.mask_rule != "code":
        broken.append(f"router.mask_rule: {router.mask_rule} must be code; transformers' phimoe masks by that rule only")
    if router.forced_balance:
        broken.append("router.forced_balance: true must be false; transformers' phimoe routes by the logits")
    return broken


def to_hf_config(
    model: ModelConfig, router: RouterConfig, *, bos_id: int | None, eos_id: int | None, dtype: str
) -> dict[str, Any]:
    """The `config.json` of an exported model, for transformers 4 and 5.

    Args:
        model: shape.
        router: must route as transformers does at inference: an export whose logits differ would be another model.
        bos_id: beginning-of-sequence id, or None.
        eos_id: end-of-sequence id, or None.
        dtype: name of the stored dtype, "float32" or "bfloat16".

    Raises:
        ValueError: lists every field that `PhimoeForCausalLM` cannot represent.
    """
    if not model.is_moe:
        raise ValueError("model.n_experts: 0 must be at least 2; transformers' phimoe has no dense model to export to")
    config.check(_router_violations(model, router))
    fields: dict[str, Any] = {
        "architectures": ["PhimoeForCausalLM"],
        "model_type": "phimoe",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "sliding_window": model.window,
        "rms_norm_eps": model.norm_eps,
        # transformers 5 reads rope_parameters, 4 reads the other two.
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "attention_bias": model.attention_bias,
        "lm_head_bias": model.lm_head_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "num_local_experts": model.n_experts,
        "num_experts_per_tok": model.top_k,
        "router_jitter_noise": router.mask_eps,
        "input_jitter_noise": 0.0,
        "initializer_range": model.init_std,
        "tie_word_embeddings": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }
    # transformers 4 derives the head size, and 5 does where the field is absent; a null would reach its arithmetic.
    if model.head_dim * model.n_heads != model.d_model:
        fields["head_dim"] = model.head_dim
    return fields


class _Fields:
    """Typed access to a parsed `config.json` that collects every complaint."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.broken: list[str] = []

    def get(self, name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """The field, or the default where it is absent or null; a complaint and zero where it is neither or mistyped."""
        value = self.content.get(name)
        value = default if value is None else value
        if value is None:
            self.broken.append(f"{name}: missing")
        elif not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            self.broken.append(f"{name}: {value!r} has a wrong type")
        else:
            return value
        return 0

    def require(self, name: str, value: Any, allowed: tuple[Any, ...], rule: str) -> None:
        """Complain unless the value is one of those allowed."""
        if value not in allowed:
            self.broken.append(f"{name}: {value!r} {rule}")


def _rope_theta(fields: _Fields) -> float:
    """The base of default rotary embedding; complains about every other kind. transformers 5 nests what 4 has at the top."""
    content = fields.content
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        fields.broken.append(f"rope_parameters: {rope!r} has a wrong type")
        return 1.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    fields.require("rope_parameters.rope_type", kind, ("default",), "must be default")
    partial = rope.get("partial_rotary_factor", content.get("partial_rotary_factor", 1.0))
    fields.require("partial_rotary_factor", partial, (None, 1, 1.0), "must be 1")
    # 1e6: PhimoeConfig's own default.
    theta = rope.get("rope_theta", content.get("rope_theta", 1e6))
    if not isinstance(theta, int | float) or isinstance(theta, bool) or theta <= 0:
        fields.broken.append(f"rope_theta: {theta!r} must be a positive number")
        return 1.0
    return float(theta)


def _check_representable(fields: _Fields) -> None:
    content = fields.content
    model_type = str(content.get("model_type")).lower().replace("-", "").replace("_", "")
    fields.require("model_type", model_type, _MODEL_TYPES, "must be phimoe")
    fields.require("hidden_act", content.get("hidden_act", "silu"), ("silu", "swish"), "must be silu")
    fields.require("tie_word_embeddings", content.get("tie_word_embeddings", False), (False, None), "must be false")
    fields.require("quantization_config", content.get("quantization_config"), (None,), "must be absent")
    fields.require("num_experts_per_tok", content.get("num_experts_per_tok", _TOP_K), (_TOP_K,), f"must be {_TOP_K}")


def _head_dim(fields: _Fields, d_model: int, n_heads: int) -> int:
    if fields.content.get("head_dim") is not None:
        return fields.get("head_dim", int)
    if n_heads > 0 and d_model % n_heads:
        fields.broken.append(
            f"hidden_size: {d_model} must be a multiple of num_attention_heads ({n_heads}) where head_dim is not given"
        )
    return d_model // n_heads if n_heads > 0 else 0


def from_hf_config(content: dict[str, Any]) -> tuple[ModelConfig, RouterConfig]:
    """Read a `config.json`. Absent fields take PhimoeConfig's defaults; fields of training (dropout, input jitter) are ignored.

    Raises:
        ValueError: lists everything that megagrin cannot represent, and fields that are missing or malformed.
    """
    fields = _Fields(content)
    _check_representable(fields)
    d_model, n_heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    max_positions = fields.get("max_position_embeddings", int)
    model = ModelConfig(
        preset="imported",
        vocab_size=fields.get("vocab_size", int),
        n_layers=fields.get("num_hidden_layers", int),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=fields.get("num_key_value_heads", int, n_heads),
        head_dim=_head_dim(fields, d_model, n_heads),
        d_ff=fields.get("intermediate_size", int),
        n_experts=fields.get("num_local_experts", int, 16),
        top_k=_TOP_K,
        max_positions=max_positions,
        window=fields.get("sliding_window", int, max_positions),
        rope_theta=_rope_theta(fields),
        norm_eps=fields.get("rms_norm_eps", (int, float), 1e-5),
        attention_bias=fields.get("attention_bias", bool, False),
        lm_head_bias=fields.get("lm_head_bias", bool, False),
        init_std=fields.get("initializer_range", (int, float), 0.02),
    )
    router = RouterConfig(mask_eps=fields.get("router_jitter_noise", (int, float), 0.01))
    # A missing field reads as zero: its broken rule would be a second line about the same thing.
    config.check([f"config.json: {line}" for line in fields.broken or model.violations() + router.violations()])
    return model, router


def _expert_views(name: str, parameter: Tensor, prefix: str, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Views of `moe.experts.gate_up_proj` (E, 2F, D), gate and up rows interleaved, or `down_proj` (E, D, F)."""
    matrix = name.rpartition(".")[2]
    if matrix == "gate_up_proj":
        parameter = parameter.unflatten(1, (-1, 2)).transpose(1, 2)  # (E, 2, F, D): gates, then ups
    if layout == "fused":
        yield f"{prefix}.mlp.experts.{matrix}", parameter
        return
    for expert in range(parameter.shape[0]):
        expert_prefix = f"{prefix}.block_sparse_moe.experts.{expert}"
        if matrix == "down_proj":
            yield f"{expert_prefix}.w2.weight", parameter[expert]
        else:
            gate_FD, up_FD = parameter[expert]
            yield f"{expert_prefix}.w1.weight", gate_FD
            yield f"{expert_prefix}.w3.weight", up_FD


def stored_shape(view: Tensor) -> list[int]:
    """Shape under which a view of `hf_views` is stored: fused experts' (E, 2, F, D) as (E, 2F, D), all others as they are."""
    shape = list(view.shape)
    return [shape[0], shape[1] * shape[2], shape[3]] if len(shape) == 4 else shape


def hf_views(model: Transformer, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the transformers checkpoint as a view into the model's own parameters: read to export, fill to import.

    Args:
        model: a mixture-of-experts model of one process, on any device (meta included).
        layout: which names and which grouping of the experts.

    Yields:
        (name in the checkpoint, view without gradient), in the order of the layers; see `stored_shape`.
    """
    for name, parameter in model.named_parameters():
        view = parameter.detach()
        parts = name.split(".")
        if parts[0] != "layers":
            parts[0] = _RENAMED.get(parts[0], parts[0])
            yield ".".join(parts), view
            continue
        prefix = f"model.layers.{parts[1]}"
        if parts[2] != "moe":
            yield ".".join([prefix, _RENAMED[parts[2]], *parts[3:]]), view
        elif parts[3] == "router":
            yield f"{prefix}.{'block_sparse_moe.gate' if layout == 'released' else 'mlp.router'}.weight", view
        else:
            yield from _expert_views(name, view, prefix, layout)
