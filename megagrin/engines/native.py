"""The native engine: FSDP2 data parallelism, expert parallelism, gradient accumulation, one clip norm, fused AdamW."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from megagrin.apex import fuse_layer_norms
from megagrin.data.loader import IGNORED_LABEL, Batch
from megagrin.models.init import init_parameters
from megagrin.models.transformer import LayerStats, ModelConfig, Output, Transformer
from megagrin.moe.balance import BalanceConfig, balance_loss, load_fraction
from megagrin.moe.layer import TrainRouting
from megagrin.moe.router import Draws, RouterConfig
from megagrin.nn.attention import AttentionBackend, attention_layers, use_backend
from megagrin.optim import OptimConfig, build_optimizer, clip_gradients, gradient_norm
from megagrin.parallel.context import slice_batch
from megagrin.parallel.data import prepare_backward
from megagrin.parallel.mesh import ParallelMesh
from megagrin.parallel.pipeline import MicroBatch, Pipeline, Stages, run_part, stage_parts
from megagrin.parallel.plan import parallelize
from megagrin.parallel.recompute import Recompute, RecomputeMode, RecomputePart
from megagrin.parallel.tensor import sequence_slice

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class EngineConfig:
    """How the native engine computes.

    Attributes:
        dtype: dtype of matrix products. bf16 keeps fp32 master weights and reduces gradients in fp32; fp64 is for tests.
        zero: what the data-parallel ranks share besides the optimizer state. 1: nothing, gradients are summed up whole on each
            rank and reduced once a step; 2: gradients, reduced after each micro-batch and summed up in shards; 3: parameters,
            too, freed after each use and gathered again (see `megagrin.parallel.data.prepare_backward`).
        recompute: activations that backward computes again: none; full: all but the blocks' inputs; selective: those of
            recompute_parts; budget: those of as few blocks as recompute_budget_gib asks for, by their shapes.
        recompute_parts: for selective, any of attention_core, expert_mlp, norms, router.
        recompute_budget_gib: for budget, GiB that the blocks of a rank may keep for backward.
        compile: torch.compile attention, norms and dense MLPs; the first steps then take longer.
        attention: kernel of attention. sdpa: torch's fused attention; flex: flex_attention, which skips what window and documents
            hide, on CUDA only; auto: flex for bf16 on CUDA, else sdpa.
        layer_norm: who computes LayerNorm: torch, apex (CUDA only), or auto, which takes apex where it can.
    """

    dtype: Literal["bf16", "fp32", "fp64"] = "bf16"
    zero: Literal[1, 2, 3] = 3
    recompute: RecomputeMode = "none"
    recompute_parts: tuple[RecomputePart, ...] = ("attention_core", "expert_mlp", "norms")
    recompute_budget_gib: float = 0.0
    compile: bool = False
    attention: AttentionBackend = "auto"
    layer_norm: Literal["auto", "torch", "apex"] = "auto"

    def violations(self) -> list[str]:
        """Every broken rule of this section, as `field: value and rule`."""
        broken = []
        if self.recompute == "budget" and self.recompute_budget_gib <= 0:
            broken.append(
                f"engine.recompute_budget_gib: {self.recompute_budget_gib} must be positive with engine.recompute=budget"
            )
        if self.recompute == "selective" and not self.recompute_parts:
            broken.append("engine.recompute_parts: none given, but engine.recompute=selective; take engine.recompute=none")
        return broken


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step came to, over the global batch and all ranks.

    Attributes:
        loss: mean cross entropy per labelled token, nats.
        balance_loss: mean over layers of n · Σ f_i · P_i with this step's own counts, without its coefficient; 1 when balanced.
        z_loss: mean over layers of the mean squared logsumexp, without its coefficient.
        grad_norm: gradient norm before clipping.
        counts_LE: rows per layer and expert, on the CPU; None in a dense model.
    """

    loss: float
    balance_loss: float
    z_loss: float
    grad_norm: float
    counts_LE: Tensor | None


class NativeEngine:
    """Owns model and optimizer and turns micro-batches into optimizer steps."""

    def __init__(
        self,
        model: ModelConfig,
        router: RouterConfig,
        balance: BalanceConfig,
        optim: OptimConfig,
        config: EngineConfig,
        mesh: ParallelMesh,
        device: torch.device,
        seed: int,
        micro_batch_tokens: int = 0,
    ) -> None:
        """Build model and optimizer.

        Args:
            micro_batch_tokens: sequences of a micro-batch × their whole length, for engine.recompute=budget.

        Raises:
            ValueError: an attention kernel that the device has not, or a memory budget that cannot be kept.
        """
        self.mesh, self.device, self.seed, self.optim_config, self.config = mesh, device, seed, optim, config
        self.balance, self.is_moe = balance, model.is_moe
        # All tp ranks hold the loss of the same whole sequences; router statistics are each rank's own.
        self._reports_loss = mesh.rank("tp") == 0
        compute_dtype = _DTYPES[config.dtype]
        master_dtype = torch.promote_types(compute_dtype, torch.float32)
        parts = stage_parts(model, mesh.config)[mesh.rank("pp") :: mesh.size("pp")]
        with torch.device("meta"):
            stages = [Transformer(model, router, balance, part).to(master_dtype) for part in parts]
        recompute = self._recompute(micro_batch_tokens, compute_dtype)
        pipelined = mesh.size("pp") > 1
        for stage in stages:
            fuse_layer_norms(stage, config.layer_norm, device)
            use_backend(attention_layers(stage), stage.attention_mask, config.attention, device, compute_dtype)
            # A pipeline's stage keeps gathered parameters from the first to the last micro-batch of a step.
            parallelize(stage, mesh, compute_dtype, config.zero == 3 and not pipelined, recompute, config.compile)
        self.model: Transformer | Stages = Stages(stages) if pipelined else stages[0]
        self.pipeline = Pipeline(stages, mesh, compute_dtype, device) if pipelined else None
        self.model.to_empty(device=device)
        init_parameters(self.model, model, seed)
        self.parameters = list(self.model.parameters())
        self.optimizer = build_optimizer(self.model, optim, compute_dtype)
        experts = max(1, model.n_experts)
        # Load fractions of the last step, for balance scope `batch`; part of the checkpoint.
        self.previous_f_LE = torch.full((model.n_layers, experts), 1 / experts, device=device)

    def train_step(self, micro_batches: list[Batch], step: int, lr: float) -> StepResult:
        """One optimizer step.

        Args:
            micro_batches: this rank's part of the global batch.
            step: optimizer step, counted from 0.
            lr: learning rate of this step.
        """
        batches = [batch.to(self.device) for batch in micro_batches]
        routed, labelled = self._global_tokens(batches)
        inputs: list[MicroBatch] = []
        for batch in (slice_batch(batch, self.mesh) for batch in batches):
            draws = Draws(self.seed, step, sequence_slice(batch.token_index_BS, self.mesh).flatten())
            inputs.append((batch, TrainRouting(draws, routed, self.previous_f_LE, self.mesh.group("tokens"))))
        sums = self._forward_backward(inputs, max(1, labelled))
        norm = gradient_norm(self.parameters, self.mesh.size("pp"))
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {step + 1}: the gradient norm is {norm.item()}; the weights were not changed")
        if self.optim_config.clip_norm > 0:
            clip_gradients(self.parameters, norm, self.optim_config.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._result(sums, routed, labelled, norm)

    def _forward_backward(self, inputs: list[MicroBatch], divisor: int) -> Tensor:
        """All micro-batches forward and backward: in the order of the pipeline's schedule, or one after the other.

        Returns:
            This rank's part of the loss and the statistics, see `_pack`.
        """
        if self.pipeline is not None:
            return torch.stack([self._pack(output) for output in self.pipeline.train(inputs, divisor)]).sum(0)
        sums: list[Tensor] = []
        for index, micro_batch in enumerate(inputs):
            prepare_backward(self.model, self.config.zero, index == len(inputs) - 1)
            output = run_part(self.model, micro_batch)
            assert output.loss_sum is not None
            (output.loss_sum / divisor).backward()
            sums.append(self._pack(output))
        return torch.stack(sums).sum(0)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> float:
        """Mean cross entropy per labelled token over all ranks' batches, with deterministic routing.

        Every rank must bring the same number of batches: sharded parameters are gathered by all ranks together.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        on_device = [slice_batch(batch.to(self.device), self.mesh) for batch in batches]
        for batch, loss_sum in zip(on_device, self._losses(on_device), strict=False):  # none but on the last stage
            if self._reports_loss:
                total += torch.stack([loss_sum.double(), (batch.labels_BS != IGNORED_LABEL).sum().double()])
        _free_gathered(self.model)
        dist.all_reduce(total)
        return (total[0] / total[1].clamp_min(1)).item()

    def _losses(self, batches: list[Batch]) -> Iterator[Tensor]:
        """Summed cross entropy of each batch; of none on a rank that does not hold the head."""
        if self.pipeline is not None:
            yield from self.pipeline.evaluate(batches)
            return
        for batch in batches:
            output = run_part(self.model, (batch, None))
            assert output.loss_sum is not None
            yield output.loss_sum

    def _global_tokens(self, batches: list[Batch]) -> tuple[int, int]:
        """Tokens, and tokens with a label, of the global batch."""
        routed = sum(batch.tokens_BS.numel() for batch in batches)
        labelled = torch.stack([(batch.labels_BS != IGNORED_LABEL).sum() for batch in batches]).sum()
        both = torch.stack([torch.full_like(labelled, routed), labelled])
        dist.all_reduce(both, group=self.mesh.group("dp"))
        return tuple(both.tolist())

    def _recompute(self, micro_batch_tokens: int, compute_dtype: torch.dtype) -> Recompute:
        config, mesh = self.config, self.mesh
        return Recompute(
            config.recompute,
            config.recompute_parts,
            budget=config.recompute_budget_gib * 2**30,
            tokens=micro_batch_tokens // (mesh.size("cp") * mesh.size("tp")),
            micro_batches=mesh.size("pp"),
            itemsize=compute_dtype.itemsize,
            tp=mesh.size("tp"),
            ep=mesh.size("ep"),
            etp=mesh.size("etp"),
        )

    def _pack(self, output: Output) -> Tensor:
        """Loss and statistics of a micro-batch as one fp64 vector: one all-reduce a step. Counts stay exact below 2^53."""
        loss = torch.zeros((), device=self.device)
        if output.loss_sum is not None and self._reports_loss:
            loss = output.loss_sum.detach()
        parts = [loss.reshape(1)]
        if output.stats is not None:
            parts += [output.stats.counts_LE.flatten(), output.stats.prob_sum_LE.flatten(), output.stats.z_sum_L]
        return torch.cat([part.double() for part in parts])

    def _result(self, sums: Tensor, routed: int, labelled: int, norm: Tensor) -> StepResult:
        dist.all_reduce(sums)
        loss = sums[0].item() / max(1, labelled)
        if not self.is_moe:
            return StepResult(loss, 0.0, 0.0, norm.item(), None)
        stats = _unpack(sums[1:], self.previous_f_LE.shape)
        f_LE = load_fraction(stats.counts_LE, torch.float64)
        self.previous_f_LE.copy_(f_LE)
        balance = balance_loss(f_LE, stats.prob_sum_LE / routed).mean().item()
        z = (stats.z_sum_L / routed).mean().item()
        return StepResult(loss, balance, z, norm.item(), stats.counts_LE.cpu())


def _free_gathered(model: nn.Module) -> None:
    """Put the sharded parameters back: those of the last forward pass would stay registered until the next backward pass.

    Under their names a checkpoint would find parameters that the optimizer does not know.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _unpack(vector: Tensor, shape: torch.Size) -> LayerStats:
    counts, probs, z_sum_L = vector.split([shape.numel(), shape.numel(), shape[0]])
    return LayerStats(counts.round().long().view(shape), probs.view(shape), z_sum_L)
