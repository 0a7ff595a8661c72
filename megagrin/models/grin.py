"""GRIN presets and the dense twins with the same active parameters.

16×3.8B is Table 1 of arXiv 2409.12136. The paper does not print the dimensions of its 16×0.9B model: these are ours, chosen so
that total (10B) and active (1.6B) parameters come out, with the head size and the key-value grouping of the large one. A dense
twin has top_k times the expert width, so that a token meets as many parameters as in the MoE.
"""

from dataclasses import replace

from megagrin.models.transformer import ModelConfig

GRIN_16X3_8B = ModelConfig(
    preset="grin_16x3_8b",
    vocab_size=32064,
    n_layers=32,
    d_model=4096,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    d_ff=6400,
    n_experts=16,
    top_k=2,
    max_positions=4096,
    window=2048,
)
GRIN_16X0_9B = replace(GRIN_16X3_8B, preset="grin_16x0_9b", n_layers=24, d_model=2048, n_heads=16, n_kv_heads=4, d_ff=4096)
GRIN_TINY = ModelConfig()


def _dense_twin(moe: ModelConfig, preset: str) -> ModelConfig:
    return replace(moe, preset=preset, n_experts=0, top_k=1, d_ff=moe.top_k * moe.d_ff)


PRESETS: dict[str, ModelConfig] = {
    config.preset: config
    for config in (
        GRIN_16X3_8B,
        GRIN_16X0_9B,
        GRIN_TINY,
        _dense_twin(GRIN_16X3_8B, "dense_6_6b"),
        _dense_twin(GRIN_16X0_9B, "dense_1_6b"),
        _dense_twin(GRIN_TINY, "dense_tiny"),
    )
}
