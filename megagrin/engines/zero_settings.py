"""What DeepSpeed is told: its configuration from ours, further settings of a user, and the rules of `engine.kind: deepspeed`."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megagrin.distributed.mesh import ParallelConfig
from megagrin.engines.base import EngineConfig
from megagrin.optim.optimizer import OptimConfig

# What the run itself decides; a file with DeepSpeed settings may not contradict it.
OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "gradient_allreduce_op",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "amp",
    "torch_autocast",
    "data_types",
    "communication_data_type",
    "pipeline",
    "tensor_parallel",
    "expert_parallel",
    "sequence_parallel_size",
    "zero_optimization.stage",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_optimizer.nvme_path",
    "zero_optimization.offload_param.device",
    "zero_optimization.offload_param.nvme_path",
    "zero_optimization.memory_efficient_linear",
    "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.mics_shard_size",
)


def read_settings(path: str | None) -> dict[str, Any]:
    """Read a JSON file of DeepSpeed settings.

    Raises:
        ValueError: no such file, no JSON object in it, or a setting that the run itself decides.
    """
    if path is None:
        return {}
    try:
        settings = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"engine.deepspeed_config: {path} cannot be read as JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"engine.deepspeed_config: {path} must hold a JSON object, not a {type(settings).__name__}")
    given = set(_paths(settings))
    if taken := [key for key in OURS if key in given]:
        raise ValueError(f"engine.deepspeed_config: {path} sets {', '.join(taken)}, which the run's own settings decide")
    return settings


def _paths(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


def deepspeed_settings(config: EngineConfig, clip_norm: float, cuda: bool) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        config: the engine's.
        clip_norm: largest gradient norm, 0 for none.
        cuda: whether this run is on a GPU.
    """
    given = read_settings(config.deepspeed_config)
    given_zero = given.get("zero_optimization", {})
    # memory_efficient_linear would patch torch.nn.functional.linear for the whole process.
    zero: dict[str, Any] = {"stage": config.zero, "overlap_comm": cuda, "memory_efficient_linear": False}
    for key, where in (("offload_optimizer", config.offload_optimizer), ("offload_param", config.offload_parameters)):
        if where != "none":
            nvme = {"nvme_path": config.nvme_path} if where == "nvme" else {}
            zero[key] = {"pin_memory": cuda} | given_zero.get(key, {}) | {"device": where, **nvme}
    ours: dict[str, Any] = {
        # Micro-batches are driven from here (set_gradient_accumulation_boundary): DeepSpeed need not know their number.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "gradient_allreduce_op": "sum" if config.zero < 3 else "mean",  # ZeRO-3 knows no sum: see ZeroState
        "communication_data_type": "fp32",
        "bf16": {"enabled": config.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }
    return given | ours | {"zero_optimization": given_zero | zero}


def violations(engine: EngineConfig, optim: OptimConfig, parallel: ParallelConfig) -> list[str]:
    """Every rule of `engine.kind` that a run breaks, as `field: value and rule`."""
    if engine.kind == "native":
        unused = ("offload_optimizer", "offload_parameters", "nvme_path", "deepspeed_config")
        given = [(name, getattr(engine, name)) for name in unused if getattr(engine, name) not in ("none", None)]
        return [f"engine.{name}: {value} needs engine.kind deepspeed" for name, value in given]
    native = "needs engine.kind native: DeepSpeed"
    broken = []
    if importlib.util.find_spec("deepspeed") is None:
        broken.append("engine.kind: deepspeed cannot be imported; pip install 'megagrin[deepspeed]'")
    if engine.dtype == "fp64":
        broken.append("engine.dtype: fp64 needs engine.kind native: DeepSpeed computes in bf16 or fp32")
    if parallel.pp > 1:
        broken.append(f"parallel.pp: {parallel.pp} {native}'s ZeRO 2 and 3 exclude pipelines")
    if parallel.dp_replicate > 1:
        broken.append(f"parallel.dp_replicate: {parallel.dp_replicate} {native} shards over all data-parallel ranks")
    if optim.kind != "adamw":
        broken.append(f"optim.kind: {optim.kind} {native} cuts matrices into flat partitions")
    if optim.fused_adam == "apex":
        broken.append(f"optim.fused_adam: apex {native} steps flat partitions by torch's AdamW, or by its own on the CPU")
    if not engine.weight_copies:
        broken.append(f"engine.weight_copies: false {native} holds weights in the products' dtype beside fp32 ones anyway")
    if engine.compile and engine.zero == 3:
        broken.append(f"engine.compile: true with engine.zero 3 {native}'s hooks would break every graph")
    broken += _offload_violations(engine)
    try:
        read_settings(engine.deepspeed_config)
    except ValueError as error:
        broken.append(str(error))
    return broken


def _offload_violations(engine: EngineConfig) -> list[str]:
    broken = []
    nvme = [name for name in ("offload_optimizer", "offload_parameters") if getattr(engine, name) == "nvme"]
    if engine.zero < 3:
        if engine.offload_optimizer == "nvme":
            broken.append(f"engine.offload_optimizer: nvme needs engine.zero 3 (it is {engine.zero}); cpu does not")
        if engine.offload_parameters != "none":
            broken.append(f"engine.offload_parameters: {engine.offload_parameters} needs engine.zero 3 (it is {engine.zero})")
    if engine.offload_parameters != "none" and engine.offload_optimizer == "none":
        broken.append(f"engine.offload_parameters: {engine.offload_parameters} needs engine.offload_optimizer cpu or nvme, too")
    if nvme and engine.nvme_path is None:
        broken.append(f"engine.nvme_path: none is given, but engine.{nvme[0]} is nvme; name a folder on a local disk")
    if not nvme and engine.nvme_path is not None:
        broken.append(f"engine.nvme_path: {engine.nvme_path} is not used: nothing is offloaded to nvme")
    return broken
