"""The native engine: FSDP2 data parallelism, pipeline schedules, gradient accumulation, one clip norm, fused AdamW."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from megagrin.checkpoint import store
from megagrin.data.loader import Batch
from megagrin.engines.base import Engine, require_finite
from megagrin.models.init import init_parameters
from megagrin.models.transformer import Transformer
from megagrin.optim.norm import CLIP_EPS, clip_gradients, gradient_norm
from megagrin.optim.optimizer import build_optimizer
from megagrin.parallel.data import prepare_backward
from megagrin.parallel.expert_weights import add_in_place, keep_copies
from megagrin.parallel.pipeline import MicroBatch, Pipeline, Stages, run_part, stage_parts


class NativeEngine(Engine):
    """Model and optimizer sharded by FSDP2."""

    model: Transformer | Stages
    _torn = False

    def setup(self) -> None:
        """See `Engine.setup`."""
        mesh = self.mesh
        pipelined = mesh.size("pp") > 1
        parts = stage_parts(self.model_config, mesh.config)[mesh.rank("pp") :: mesh.size("pp")]
        # A pipeline's stage keeps gathered parameters from the first to the last micro-batch of a step.
        stages = [self.build(part, self.config.zero == 3 and not pipelined) for part in parts]
        self.model = Stages(stages) if pipelined else stages[0]
        self.pipeline = Pipeline(stages, mesh, self.compute_dtype, self.device) if pipelined else None
        self.model.to_empty(device=self.device)
        init_parameters(self.model, self.model_config, self.seed)
        self.parameters = list(self.model.parameters())
        narrow = self.compute_dtype == torch.bfloat16
        self.copied = keep_copies(self.model, self.compute_dtype) if narrow and self.config.weight_copies else []
        if not (pipelined and mesh.config.pp_schedule == "zero_bubble"):
            add_in_place(self.model, self.config.zero)
        self.optimizer = build_optimizer(self.model, self.optim_config, self.compute_dtype)

    def forward_backward(self, inputs: list[MicroBatch], divisor: int) -> Tensor:
        """In the order of the pipeline's schedule, or one micro-batch after the other; see `Engine.forward_backward`."""
        self.optimizer.zero_grad()  # of a step that did not come to its end
        with self._passes():
            if self.pipeline is not None:
                return torch.stack([self.pack(output) for output in self.pipeline.train(inputs, divisor)]).sum(0)
            sums: list[Tensor] = []
            for index, micro_batch in enumerate(inputs):
                prepare_backward(self.model, self.config.zero, index == len(inputs) - 1)
                output = run_part(self.model, micro_batch)
                assert output.loss_sum is not None
                (output.loss_sum / divisor).backward()
                sums.append(self.pack(output))
            return torch.stack(sums).sum(0)

    def update(self, step: int, lr: float) -> Tensor:
        """See `Engine.update`."""
        _free_gathered(self.model)  # those kept for the step's micro-batches will not be the weights of the next
        norm, limit = gradient_norm(self.parameters, self.mesh.size("pp")), self.optim_config.clip_norm
        if require_finite(norm, step) + CLIP_EPS > limit > 0:  # else a pass over all gradients would multiply by 1
            clip_gradients(self.parameters, norm, limit)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        for experts in self.copied:
            experts.expire_copies()
        return norm

    def evaluate(self, batches: list[Batch]) -> float:
        """See `Engine.evaluate`."""
        try:
            return super().evaluate(batches)
        finally:
            _free_gathered(self.model)

    def losses(self, batches: list[Batch]) -> Iterator[Tensor]:
        """See `Engine.losses`."""
        with self._passes():
            if self.pipeline is not None:
                yield from self.pipeline.evaluate(batches)
                return
            for batch in batches:
                output = run_part(self.model, (batch, None))
                assert output.loss_sum is not None
                yield output.loss_sum

    def state(self, optimizer: bool = True) -> dict[str, Tensor]:
        """See `Engine.state`."""
        self._free()
        weights = store.model_tensors(self.model)
        if not optimizer:
            return weights
        return weights | store.optimizer_tensors(self.model, self.optimizer) | {"extra.previous_load": self.previous_f_LE}

    def load_state(self, state: dict[str, Tensor], step: int) -> None:
        """See `Engine.load_state`: the tensors are the engine's own, filled in place."""
        for experts in self.copied:
            experts.expire_copies()
        if "extra.previous_load" in state:
            store.set_steps(self.optimizer, step)

    @contextmanager
    def _passes(self) -> Iterator[None]:
        """Forward and backward passes: nothing in 16 bits is older than the weights, whoever has changed them."""
        self._free()
        for experts in self.copied:
            experts.refresh_copies()
        try:
            yield
        except (Exception, KeyboardInterrupt):
            self._torn = any(isinstance(module, FSDPModule) for module in self.model.modules())
            raise

    def _free(self) -> None:
        """Put the sharded parameters back.

        Raises:
            RuntimeError: a pass was broken off. FSDP2 has no way back from the middle of one: gathered weights stay in their
                places, and sums of gradients with them.
        """
        if self._torn:
            raise RuntimeError(
                "an error has ended a forward or backward pass in its middle, which leaves gathered weights and parts of "
                "gradients in FSDP2: build the engine anew and load a checkpoint"
            )
        _free_gathered(self.model)


def _free_gathered(model: nn.Module) -> None:
    """Put the sharded parameters back: those of the last pass would stay registered until they are freed.

    Under their names a checkpoint would find parameters that the optimizer does not know.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
