"""torch.compile on the dense parts of a model: attention, norms, dense MLP.

Experts and token exchange stay as they are: their work is in kernels of their own, and their sizes are data. So does the router:
a draw is a function of the bits of a softmax, which a compiler may change, and what is left of it is one product.
"""

import torch
from torch import nn

from megagrin.models.transformer import Transformer
from megagrin.nn.attention import Attention
from megagrin.nn.mlp import SwiGLU

_DENSE = (Attention, nn.LayerNorm, SwiGLU)


def compile_dense(model: Transformer) -> None:
    """Compile the forward functions, not the modules: names of parameters stay, and FSDP's hooks stay outside."""
    dense: list[nn.Module] = [module for module in model.modules() if isinstance(module, _DENSE)]
    for module in dense:
        module.forward = torch.compile(module.forward)
