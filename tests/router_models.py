"""MoE layers for the router's tests."""

import torch

from megagrin.moe.balance import BalanceConfig
from megagrin.moe.layer import MoELayer
from megagrin.moe.router import RouterConfig


def moe_layer(n_experts: int, d_model: int, d_ff: int, top_k: int, config: RouterConfig, seed: int = 0) -> MoELayer:
    """An fp64 layer with standard normal weights and no balance loss."""
    layer = MoELayer(d_model, d_ff, n_experts, top_k, 0, config, BalanceConfig(coef=0.0)).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return layer
