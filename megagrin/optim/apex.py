"""NVIDIA apex, where it can be imported: fused Adam and fused LayerNorm, with torch's names for parameters and state."""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from megagrin.distributed.comm import local_tensor


def use_apex(choice: str, knob: str, extension: str, example: Tensor) -> bool:
    """Whether apex computes something: `auto` takes it where it can run.

    Args:
        choice: auto, torch or apex.
        knob: the setting's name, for errors.
        extension: compiled module that apex needs for it. Without it apex imports, and fails at its first use.
        example: a tensor as it will be computed with.

    Raises:
        ValueError: apex is asked for and cannot be imported, or not be used on this device or dtype.
    """
    if choice == "torch":
        return False
    problem = apex_problem(example.device.type, example.dtype, extension)
    if problem and choice == "apex":
        raise ValueError(f"{knob}: apex {problem}; use auto or torch")
    return not problem


def apex_problem(device_type: str, dtype: torch.dtype, extension: str) -> str:
    """Why apex cannot compute something here, to be put behind its name; empty when it can.

    Args:
        device_type: of the tensors.
        dtype: of the tensors.
        extension: compiled module that apex needs for it.
    """
    if device_type != "cuda":
        return f"runs on CUDA devices only, and this run is on {device_type}"
    if dtype == torch.float64:
        return "does not compute in fp64"
    missing = [name for name in ("apex", extension) if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"cannot be imported ({', '.join(missing)} not found); build it from https://github.com/NVIDIA/apex "
            "with its C++ and CUDA extensions (the package of that name on PyPI is another one)"
        )
    return ""


class ApexAdam(torch.optim.Optimizer):
    """apex's FusedAdam as AdamW over sharded parameters.

    apex's kernels take plain tensors, so FusedAdam works on stand-ins that share storage with this rank's shards. State lies
    under torch's names (exp_avg, exp_avg_sq) at the parameters; `step` is counted in each group, as apex does.

    Args:
        groups: parameter groups with `weight_decay`.
        lr: learning rate.
        betas: decay of first and second moment.
        eps: epsilon.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        from apex.optimizers import FusedAdam

        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "step": 0})
        self._shards = [[nn.Parameter(local_tensor(p).detach()) for p in group["params"]] for group in self.param_groups]
        listed = [
            {"params": shards, "weight_decay": group["weight_decay"]}
            for shards, group in zip(self._shards, self.param_groups, strict=True)
        ]
        self._fused = FusedAdam(listed, lr=lr, betas=betas, eps=eps, adam_w_mode=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; parameters without gradient stay as they are."""
        for group, fused, shards in zip(self.param_groups, self._fused.param_groups, self._shards, strict=True):
            fused["lr"], fused["step"] = group["lr"], group["step"]
            for parameter, shard in zip(group["params"], shards, strict=True):
                state = self.state[parameter]
                for moment in ("exp_avg", "exp_avg_sq"):
                    if moment not in state:
                        state[moment] = torch.zeros_like(parameter)
                # Anew each step: FSDP2 may move a shard (it pads it before the first forward), a load may replace a moment.
                shard.data = local_tensor(parameter).detach()
                shard.grad = None if parameter.grad is None else local_tensor(parameter.grad)
                self._fused.state[shard] = {moment: local_tensor(state[moment]) for moment in ("exp_avg", "exp_avg_sq")}
        self._fused.step()
        for group, fused, shards in zip(self.param_groups, self._fused.param_groups, self._shards, strict=True):
            group["step"] = fused["step"]
            for shard in shards:
                shard.grad = None


class ApexLayerNorm(nn.LayerNorm):
    """LayerNorm computed by apex, with the parameters of the module it takes the place of."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine

        super().__init__(norm.normalized_shape, norm.eps, device=norm.weight.device, dtype=norm.weight.dtype)
        self._kernel = fused_layer_norm_affine

    def forward(self, input: Tensor) -> Tensor:
        """(…, D) -> (…, D)."""
        return self._kernel(input, self.weight, self.bias, self.normalized_shape, self.eps)


def fuse_layer_norms(model: nn.Module, choice: str, device: torch.device) -> None:
    """Put apex's LayerNorm in the place of torch's, on the meta device, where `choice` (auto, torch or apex) says so.

    Raises:
        ValueError: apex is asked for and cannot be used here.
    """
    dtype = next(model.parameters()).dtype
    if not use_apex(choice, "engine.layer_norm", "fused_layer_norm_cuda", torch.empty(0, dtype=dtype, device=device)):
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.LayerNorm:
                setattr(parent, name, ApexLayerNorm(child))
