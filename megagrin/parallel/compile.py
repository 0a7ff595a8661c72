"""torch.compile on the parts whose shapes do not depend on the routing: attention, norms, dense MLP, router.

Experts and token exchange stay as they are: their work is in kernels of its own, and their sizes are data.
"""

import torch
from torch import nn

from megagrin.models.transformer import Transformer
from megagrin.moe.router import Router
from megagrin.nn.attention import Attention
from megagrin.nn.mlp import SwiGLU

_DENSE = (Attention, nn.LayerNorm, SwiGLU, Router)


def compile_dense(model: Transformer) -> None:
    """Compile the forward functions, not the modules: names of parameters stay, and FSDP's hooks stay outside."""
    dense: list[nn.Module] = [module for module in model.modules() if isinstance(module, _DENSE)]
    for module in dense:
        module.forward = torch.compile(module.forward)
