"""Random models whose routing, biases and norms all matter, for the tests against transformers."""

import torch

from megagrin.models.init import init_parameters
from megagrin.models.transformer import ModelConfig, Transformer
from megagrin.moe.router import RouterConfig

# init_std 0.15: logits of unit size with rounding noise of 4e-6 (0.3 amplifies it to 4e-5). mask_eps 0.2: masks keep several
# experts, and another mask moves the logits by 0.3 to 2.5.
BASE = ModelConfig(
    vocab_size=131,
    n_layers=3,
    d_model=60,
    n_heads=6,
    n_kv_heads=3,
    head_dim=10,
    d_ff=37,
    n_experts=5,
    max_positions=64,
    window=7,
    init_std=0.15,
)
ROUTER = RouterConfig(mask_eps=0.2)


def random_model(shape: ModelConfig = BASE, router: RouterConfig = ROUTER) -> Transformer:
    model = Transformer(shape, router)
    init_parameters(model, shape, seed=3)
    perturb(model)
    return model.eval()


@torch.no_grad()
def perturb(model: torch.nn.Module) -> None:
    """Biases and norms that do something."""
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
