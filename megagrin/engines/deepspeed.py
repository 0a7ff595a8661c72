"""The DeepSpeed engine: ZeRO 1 to 3 on the groups of our mesh, with offload of optimizer state and parameters.

Model, parallel layers and token exchange are the native engine's; DeepSpeed has the data-parallel side: gradients reduced over
the ranks that share a parameter, sharded fp32 weights and moments, offload. It gets plain tensors and process groups
(`zero_groups.py`), reduces plain sums, and clips by our norm (`zero_state.py`), so that a run is the run of the native engine.

Weights are handed over in the dtype of products. The router's too: its logits are fp32 as ever, but of weights rounded to bf16,
where FSDP2 leaves them fp32. In fp32 both engines give the same run.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megagrin.checkpoint import store
from megagrin.checkpoint.store import DEEPSPEED_FOLDER, Format
from megagrin.data.loader import Batch
from megagrin.distributed.comm import local_tensor
from megagrin.engines.base import Engine
from megagrin.engines.zero_groups import Groups, Placed, axes, moe_marker, place
from megagrin.engines.zero_settings import deepspeed_settings
from megagrin.engines.zero_state import MOMENTS, ZeroState
from megagrin.models.init import init_parameter
from megagrin.models.transformer import Output, Transformer
from megagrin.optim.optimizer import decays
from megagrin.parallel.pipeline import MicroBatch, run_part
from megagrin.settings.config import changed_fields


class DeepSpeedEngine(Engine):
    """Model and optimizer in the hands of DeepSpeed."""

    model: Transformer

    def setup(self) -> None:
        """See `Engine.setup`."""
        # DeepSpeed looks for its accelerator when it is imported, and for the local rank when it partitions.
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)
        os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.WARNING)  # it reports its settings and memory in some hundred lines
        self._groups = Groups(self.mesh)
        self._groups.register()
        self.model = self.build(None, None)
        self.model.to(self.compute_dtype)
        # DeepSpeed prepares backward passes by hooks on the tensors that it finds in what a model returns: it looks into tuples.
        self.model.register_forward_hook(lambda module, arguments, output: (output.loss_sum, output))
        kinds = axes(self.model, self.mesh)
        self.placed = {name: place(parameter, kinds[name], self.mesh) for name, parameter in self.model.named_parameters()}
        settings = deepspeed_settings(self.config, self.optim_config.clip_norm, self.device.type == "cuda")
        self._materialise(settings)
        named = dict(self.model.named_parameters())
        group_names = [name for kind in kinds.values() if (name := self._groups.name(kind)) is not None]
        if group_names and self.config.zero < 3:
            self.model.add_module("named_groups", moe_marker(group_names[0]))
        optimizer = self._optimizer(named)
        self.zero, *_ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=settings, mpu=self._groups, dist_init_required=False
        )
        self.zero_state = ZeroState(self.zero.optimizer, named, self.placed)
        self._write_initial_weights()

    def _materialise(self, settings: dict[str, Any]) -> None:
        """Memory for the parameters, as plain tensors; under ZeRO-3 block by block, each partitioned before the next is made."""
        import deepspeed

        blocks: list[tuple[str, nn.Module]] = [(f"layers.{name}", block) for name, block in self.model.layers.named_children()]
        blocks += [(name, child) for name, child in self.model.named_children() if name != "layers"]
        swapper = None  # one for all: a new one empties the folder of files
        for path, block in blocks:
            block.to_empty(device=self.device)
            for name, parameter in list(block.named_parameters()):
                owner, _, leaf = name.rpartition(".")
                plain = nn.Parameter(local_tensor(parameter.detach()).zero_())
                self._groups.mark(plain, self.placed[f"{path}.{name}"])
                block.get_submodule(owner).register_parameter(leaf, plain)
            if self.config.zero == 3 and any(True for _ in block.parameters()):
                data_parallel = self._groups.get_data_parallel_group()
                partitioned = deepspeed.zero.Init(
                    module=block,
                    config_dict_or_path=settings,
                    mpu=self._groups,
                    data_parallel_group=data_parallel,
                    param_swapper=swapper,
                )
                swapper = partitioned.param_swapper

    def parameter_groups(self, named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
        """One group per kind and decay, so that what DeepSpeed makes flat has one group of ranks, and one count."""
        optim = self.optim_config
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for name, parameter in named.items():
            placed = self.placed[name]
            decay = optim.weight_decay if decays(name, len(placed.shape)) else 0.0
            group_name = self._groups.name(placed.axis)
            key = (group_name, placed.replicas, decay)
            group = {"params": [], "weight_decay": decay, "name": group_name or "dense"} | ({"moe": True} if group_name else {})
            groups.setdefault(key, group)["params"].append(parameter)
        return list(groups.values())

    def _optimizer(self, named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW, DeepSpeed's own where it runs on the CPU for offload."""
        optim, groups = self.optim_config, self.parameter_groups(named)
        options: dict[str, Any] = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
        if self.config.offload_optimizer != "none":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            offloaded: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
            return offloaded
        return torch.optim.AdamW(groups, fused=True, **options)

    def _write_initial_weights(self) -> None:
        """The initial weights of the native engine, made in the shards in which they are written."""
        for name in self.placed:
            value = self._empty(self.placed[name])
            init_parameter(name, value, self.model_config, self.seed)
            self.zero_state.write(name, None, value)
        self.zero_state.publish()

    def _empty(self, placed: Placed) -> DTensor:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape = torch.Size(placed.shape)
        local, _ = compute_local_shape_and_global_offset(shape, placed.mesh, placed.placements)
        stride = torch.empty(shape, device="meta").stride()
        empty = torch.empty(local, device=self.device)
        return DTensor.from_local(empty, placed.mesh, placed.placements, run_check=False, shape=shape, stride=stride)

    def forward_backward(self, inputs: list[MicroBatch], divisor: int) -> Tensor:
        """One micro-batch after the other; see `Engine.forward_backward`."""
        sums: list[Tensor] = []
        for index, micro_batch in enumerate(inputs):
            self.zero.set_gradient_accumulation_boundary(index == len(inputs) - 1)
            output = self._run(micro_batch)
            assert output.loss_sum is not None
            self.zero.backward(output.loss_sum / divisor, scale_wrt_gas=False)
            sums.append(self.pack(output))
        return torch.stack(sums).sum(0)

    def update(self, step: int, lr: float) -> Tensor:
        """See `Engine.update`."""
        state = self.zero_state
        state.step = step
        if state.clipped_outside:
            norm = state.norm()
            if self.optim_config.clip_norm > 0:
                state.clip(norm, self.optim_config.clip_norm)
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
        self.zero.step()
        return norm if state.clipped_outside else torch.as_tensor(self.zero.get_global_grad_norm())

    def save(self, folder: Path, kind: Format) -> None:
        """See `Engine.save`; kind deepspeed lets DeepSpeed write its own files."""
        if kind == "native":
            super().save(folder, kind)
            return
        client_state = {"previous_load": self.previous_f_LE.cpu()}
        self.zero.save_checkpoint(str(folder), tag=DEEPSPEED_FOLDER, client_state=client_state, save_latest=False)

    def load(self, path: Path, step: int) -> None:
        """See `Engine.load`; also reads what DeepSpeed wrote under the same layout and ZeRO stage.

        DeepSpeed's files are pickles: read only those that you trust.
        """
        if store.format_of(path) == "native":
            super().load(path, step)
            return
        self._refuse_other_layouts(path)
        _, client_state = self.zero.load_checkpoint(str(path), tag=DEEPSPEED_FOLDER)
        self.previous_f_LE.copy_(client_state["previous_load"])
        self.zero_state.link_moments()
        # Each rank has read its own fp32 weights; those in dtype are of the rank that saved them for all.
        self.zero_state.publish()

    def _refuse_other_layouts(self, path: Path) -> None:
        """DeepSpeed itself would fill the flat partitions of another layout as far as they go, without a word."""
        files = len(list((path / DEEPSPEED_FOLDER).glob("*_optim_states.pt")))
        if files != dist.get_world_size():
            raise ValueError(f"{path}: DeepSpeed's files of {files} ranks are read by as many, not by {dist.get_world_size()}")
        saved = store.read_info(path).run
        now = {"parallel": dataclasses.asdict(self.mesh.config), "engine": dataclasses.asdict(self.config)}
        differing = changed_fields({section: saved[section] for section in now}, now)
        decisive = ("parallel.", "engine.zero", "engine.dtype", "engine.offload")
        if changes := [change for change in differing if change.startswith(decisive)]:
            raise ValueError(
                f"{path}: DeepSpeed's files belong to another layout ({'; '.join(changes)}); convert it by way of native"
            )

    def losses(self, batches: list[Batch]) -> Iterator[Tensor]:
        """See `Engine.losses`."""
        for batch in batches:
            output = self._run((batch, None))
            assert output.loss_sum is not None
            yield output.loss_sum

    def _run(self, micro_batch: MicroBatch) -> Output:
        returned: Any = run_part(self.zero, micro_batch)  # a tuple: see the hook in setup
        output: Output = returned[1]
        return output

    def state(self, optimizer: bool = True) -> dict[str, Tensor]:
        """See `Engine.state`; copies."""
        state: dict[str, Tensor] = {}
        for name in self.placed:
            state[f"model.{name}"] = self.zero_state.read(name, None)
            if optimizer:
                state |= {f"optim.{name}.{moment}": self.zero_state.read(name, moment) for moment in MOMENTS}
        return state | ({"extra.previous_load": self.previous_f_LE} if optimizer else {})

    def load_state(self, state: dict[str, Tensor], step: int) -> None:
        """See `Engine.load_state`."""
        for name in self.placed:
            for moment, key in ((None, f"model.{name}"), *((moment, f"optim.{name}.{moment}") for moment in MOMENTS)):
                if key in state:
                    value = state[key]
                    assert isinstance(value, DTensor)
                    self.zero_state.write(name, moment, value)
        self.zero_state.publish()
        if "extra.previous_load" in state:
            self.zero_state.set_steps(step)
