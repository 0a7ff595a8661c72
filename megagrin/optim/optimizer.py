"""The optimizer over all parameters of a model, and the settings of its section."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megagrin.optim.apex import ApexAdam, use_apex
from megagrin.optim.muon import Muon, is_matrix


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule.

    Attributes:
        kind: adamw; or muon, which orthogonalises the update of every matrix (of each expert separately) and leaves embedding,
            head, routers, norms and biases to AdamW.
        lr: peak learning rate; the same for both kinds, as Muon's updates are scaled to AdamW's.
        min_lr_ratio: learning rate of the last step as a fraction of lr.
        schedule: cosine decays from warm-up to the end; wsd stays at the peak and decays linearly in the last decay_fraction of
            the steps, after warm-up; constant stays. See `megagrin.optim.schedule.learning_rate`.
        warmup_steps: steps of linear warm-up; the first has lr / warmup_steps, the last has lr.
        decay_fraction: wsd only; rounded up to whole steps.
        beta1: AdamW's first moment.
        beta2: AdamW's second moment.
        eps: AdamW's epsilon.
        muon_momentum: Muon's Nesterov momentum.
        weight_decay: decoupled decay of matrices; biases and norms have none.
        clip_norm: largest gradient norm over all parameters; 0 switches clipping off.
        fused_adam: who computes AdamW's step: torch, apex (CUDA only), or auto, which takes apex where it can. A state saved
            with one loads with the other.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4
    min_lr_ratio: float = 0.1
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    muon_momentum: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    fused_adam: Literal["auto", "torch", "apex"] = "auto"

    def violations(self) -> list[str]:
        """Every broken rule of this section, as `field: value and rule`."""
        rules = [
            ("lr", self.lr > 0, "must be positive"),
            ("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "must lie in [0, 1]"),
            ("warmup_steps", self.warmup_steps >= 0, "must not be negative"),
            ("decay_fraction", 0 <= self.decay_fraction <= 1, "must lie in [0, 1]"),
            ("beta1", 0 <= self.beta1 < 1, "must lie in [0, 1)"),
            ("beta2", 0 <= self.beta2 < 1, "must lie in [0, 1)"),
            ("eps", self.eps > 0, "must be positive"),
            ("muon_momentum", 0 <= self.muon_momentum < 1, "must lie in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "must not be negative"),
            ("clip_norm", self.clip_norm >= 0, "must not be negative (0 switches clipping off)"),
        ]
        return [f"optim.{name}: {getattr(self, name)} {rule}" for name, holds, rule in rules if not holds]


def build_optimizer(model: nn.Module, config: OptimConfig, dtype: torch.dtype) -> torch.optim.Optimizer:
    """The optimizer over all parameters of a model.

    Args:
        model: parameters on their device, sharded or not.
        config: what to build.
        dtype: dtype of matrix products, in which Muon orthogonalises.

    Raises:
        ValueError: apex is asked for and cannot be used here.
    """
    named = list(model.named_parameters())
    if config.kind == "adamw":
        return _build_adamw(named, config)
    adamw = _build_adamw([(name, parameter) for name, parameter in named if not is_matrix(name, parameter)], config)
    matrices = [(name, parameter) for name, parameter in named if is_matrix(name, parameter)]
    return Muon(adamw, matrices, config.lr, config.weight_decay, config.muon_momentum, dtype)


def decays(name: str, dimensions: int) -> bool:
    """Whether weight decay takes a parameter: matrices and stacks of them, embedding and head included; no bias, no norm."""
    return dimensions > 1 and not name.endswith(("norm.weight", "bias"))


def _build_adamw(named: list[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """Fused AdamW with one group per (mesh, decay): a fused step takes tensors of one mesh only."""
    groups: dict[tuple[object, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        decay = decays(name, parameter.dim())
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((mesh, decay), []).append(parameter)
    listed = [{"params": params, "weight_decay": config.weight_decay if decay else 0.0} for (_, decay), params in groups.items()]
    betas = (config.beta1, config.beta2)
    if use_apex(config.fused_adam, "optim.fused_adam", "amp_C", named[0][1]):
        return ApexAdam(listed, config.lr, betas, config.eps)
    return torch.optim.AdamW(listed, lr=config.lr, betas=betas, eps=config.eps, fused=True)
