"""What engines share: their configuration, the optimizer step, evaluation, and what goes into a checkpoint."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagrin.checkpoint import store
from megagrin.checkpoint.store import Format
from megagrin.data.loader import IGNORED_LABEL, Batch
from megagrin.distributed.mesh import ParallelMesh
from megagrin.models.transformer import LayerStats, ModelConfig, Output, Part, Transformer
from megagrin.moe.balance import BalanceConfig, balance_loss, load_fraction
from megagrin.moe.layer import TrainRouting
from megagrin.moe.router import Draws, RouterConfig
from megagrin.nn.attention import AttentionBackend, attention_layers, use_backend
from megagrin.optim.apex import fuse_layer_norms
from megagrin.optim.optimizer import OptimConfig
from megagrin.parallel.context import slice_batch
from megagrin.parallel.pipeline import MicroBatch
from megagrin.parallel.plan import parallelize
from megagrin.parallel.recompute import Recompute, RecomputeMode, RecomputePart
from megagrin.parallel.tensor import sequence_slice

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class EngineConfig:
    """How a step is computed.

    Attributes:
        kind: native: FSDP2, with every parallel dimension; deepspeed: DeepSpeed's ZeRO, with offload to CPU memory and NVMe
            (offload_optimizer, offload_parameters), without pipeline. `--engine=deepspeed` says the same.
        dtype: dtype of matrix products. bf16 keeps fp32 master weights and reduces gradients in fp32; fp64 is for tests.
        zero: what the data-parallel ranks share besides the optimizer state. 1: nothing, gradients are summed up whole on each
            rank and reduced once a step; 2: gradients, reduced after each micro-batch and summed up in shards; 3: parameters,
            too, freed after each use and gathered again (see `megagrin.parallel.data.prepare_backward`).
        weight_copies: native only, bf16: weights of which no other rank holds a part are kept in bf16, too, and cast once a step:
            2 bytes a weight of memory. False casts them in every forward and every backward pass.
        recompute: activations that backward computes again: none; full: all but the blocks' inputs; selective: those of
            recompute_parts; budget: those of as few blocks as recompute_budget_gib asks for, by their shapes.
        recompute_parts: for selective, any of attention_core, expert_mlp, norms, router.
        recompute_budget_gib: for budget, GiB that the blocks of a rank may keep for backward.
        compile: torch.compile attention, norms and dense MLPs; the first steps then take longer.
        attention: kernel of attention. sdpa: torch's fused attention; flex: flex_attention, which skips what window and documents
            hide, on CUDA only; auto: flex for bf16 on CUDA, else sdpa.
        layer_norm: who computes LayerNorm: torch, apex (CUDA only), or auto, which takes apex where it can.
        offload_optimizer: deepspeed only: where fp32 weights and moments live, and AdamW runs on the CPU: none, cpu, or nvme
            (ZeRO 3).
        offload_parameters: deepspeed with ZeRO 3 only: where shards of the weights in dtype live: none, cpu or nvme.
        nvme_path: folder on a local disk for offload to nvme.
        deepspeed_config: JSON file with further settings of DeepSpeed (bucket sizes, aio, …); what follows from the run (batch
            sizes, dtypes, clipping, optimizer, ZeRO stage, offload) is refused.
    """

    kind: Literal["native", "deepspeed"] = "native"
    dtype: Literal["bf16", "fp32", "fp64"] = "bf16"
    zero: Literal[1, 2, 3] = 3
    weight_copies: bool = True
    recompute: RecomputeMode = "none"
    recompute_parts: tuple[RecomputePart, ...] = ("attention_core", "expert_mlp", "norms")
    recompute_budget_gib: float = 0.0
    compile: bool = False
    attention: AttentionBackend = "auto"
    layer_norm: Literal["auto", "torch", "apex"] = "auto"
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    deepspeed_config: str | None = None

    def violations(self) -> list[str]:
        """Every broken rule of this section, as `field: value and rule`."""
        broken = []
        if self.recompute == "budget" and self.recompute_budget_gib == 0:
            broken.append(
                f"engine.recompute_budget_gib: {self.recompute_budget_gib} must be positive with engine.recompute=budget"
            )
        if self.recompute_budget_gib < 0:
            broken.append(f"engine.recompute_budget_gib: {self.recompute_budget_gib} must not be negative")
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


class Engine(ABC):
    """Owns model and optimizer and turns micro-batches into optimizer steps.

    Attributes:
        model: this rank's part of the model.
        previous_f_LE: load fractions of the last step, for balance scope `batch`; part of the checkpoint.
    """

    model: nn.Module

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
            ValueError: an attention kernel that the device has not, a memory budget that cannot be kept, or a library that is
                asked for and missing.
        """
        self.mesh, self.device, self.seed, self.optim_config, self.config = mesh, device, seed, optim, config
        self.model_config, self.router_config, self.balance = model, router, balance
        self.is_moe, self.micro_batch_tokens = model.is_moe, micro_batch_tokens
        self.compute_dtype = DTYPES[config.dtype]
        # All tp ranks hold the loss of the same whole sequences; router statistics are each rank's own.
        self._reports_loss = mesh.rank("tp") == 0
        experts = max(1, model.n_experts)
        self.previous_f_LE = torch.full((model.n_layers, experts), 1 / experts, device=device)
        self.setup()

    @abstractmethod
    def setup(self) -> None:
        """Build `model` and the optimizer."""

    def build(self, part: Part | None, reshard: bool | None) -> Transformer:
        """The model or a part of it on the meta device, with every parallel dimension applied.

        Args:
            part: None for the whole.
            reshard: see `parallelize`.
        """
        config, device = self.config, self.device
        with torch.device("meta"):
            model = Transformer(self.model_config, self.router_config, self.balance, part)
            model.to(torch.promote_types(self.compute_dtype, torch.float32))
        fuse_layer_norms(model, config.layer_norm, device)
        use_backend(attention_layers(model), model.attention_mask, config.attention, device, self.compute_dtype)
        parallelize(model, self.mesh, self.compute_dtype, reshard, self._recompute(), config.compile, config.weight_copies)
        return model

    def train_step(self, micro_batches: list[Batch], step: int, lr: float) -> StepResult:
        """One optimizer step.

        Args:
            micro_batches: this rank's part of the global batch.
            step: optimizer step, counted from 0.
            lr: learning rate of this step.

        Raises:
            ValueError: no token of the global batch has a label; every rank says so, and nothing was changed.
            FloatingPointError: the gradient norm is not finite; the weights were not changed.
        """
        batches = [batch.to(self.device) for batch in micro_batches]
        routed, labelled = self._global_tokens(batches)
        if labelled == 0:
            raise ValueError(
                f"step {step + 1}: no token of the global batch from data.train has a label, there is nothing to learn; "
                "with data.document_attention a document of one token has none"
            )
        inputs: list[MicroBatch] = []
        tokens_group = self.mesh.group("tokens")
        for batch in (slice_batch(batch, self.mesh) for batch in batches):
            draws = Draws(self.seed, step, sequence_slice(batch.token_index_BS, self.mesh).flatten())
            inputs.append((batch, TrainRouting(draws, routed, self.previous_f_LE, tokens_group)))
        sums = self.forward_backward(inputs, labelled)
        norm = self.update(step, lr)
        return self._result(sums, routed, labelled, norm)

    @abstractmethod
    def forward_backward(self, inputs: list[MicroBatch], divisor: int) -> Tensor:
        """All micro-batches forward and backward.

        Args:
            inputs: this rank's micro-batches.
            divisor: the loss is divided by it before backward; gradients are plain sums over ranks.

        Returns:
            This rank's part of the loss and the statistics, see `pack`.
        """

    @abstractmethod
    def update(self, step: int, lr: float) -> Tensor:
        """Clip gradients and take the optimizer's step.

        Returns:
            The gradient norm before clipping, a scalar.

        Raises:
            FloatingPointError: the norm is not finite; nothing was changed.
        """

    @abstractmethod
    def losses(self, batches: list[Batch]) -> Iterator[Tensor]:
        """Summed cross entropy of each batch, routed deterministically; of none on a rank that does not hold the head."""

    @abstractmethod
    def state(self, optimizer: bool = True) -> dict[str, Tensor]:
        """Tensors that make up a checkpoint, under the names of the whole model; a collective call.

        They are filled in place by `megagrin.checkpoint.store.load`, and then given to `load_state`.

        Args:
            optimizer: with moments and load fractions; False for the weights alone.
        """

    @abstractmethod
    def load_state(self, state: dict[str, Tensor], step: int) -> None:
        """Take over what `state` returned, with new contents; a collective call.

        Args:
            state: all of `state()`, or the weights alone.
            step: optimizer steps done; bias correction counts on from there.
        """

    def save(self, folder: Path, kind: Format) -> None:
        """Write a checkpoint's tensors into an existing folder; every rank calls it."""
        assert kind == "native", "training/rules.py has a rule"
        store.write_tensors(folder, self.state())

    def load(self, path: Path, step: int) -> None:
        """Continue from a committed checkpoint after `step` optimizer steps; every rank calls it.

        Raises:
            ValueError: it was written by another model, or in a format that this engine does not read.
        """
        state = self.state()
        store.load(path, state)
        self.load_state(state, step)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> float:
        """Mean cross entropy per labelled token over all ranks' batches, with deterministic routing.

        Every rank must bring the same number of batches: sharded parameters are gathered by all ranks together.

        Raises:
            ValueError: no token of any batch has a label; every rank says so.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        on_device = [slice_batch(batch.to(self.device), self.mesh) for batch in batches]
        for batch, loss_sum in zip(on_device, self.losses(on_device), strict=False):  # none but on the last stage
            if self._reports_loss:
                total += torch.stack([loss_sum.double(), (batch.labels_BS != IGNORED_LABEL).sum().double()])
        dist.all_reduce(total)
        if total[1] == 0:
            raise ValueError("data.valid: no token of the evaluation has a label, its mean loss is not defined")
        return (total[0] / total[1]).item()

    def pack(self, output: Output) -> Tensor:
        """Loss and statistics of a micro-batch as one fp64 vector: one all-reduce a step. Counts stay exact below 2^53."""
        loss = torch.zeros((), device=self.device)
        if output.loss_sum is not None and self._reports_loss:
            loss = output.loss_sum.detach()
        parts = [loss.reshape(1)]
        if output.stats is not None:
            parts += [output.stats.counts_LE.flatten(), output.stats.prob_sum_LE.flatten(), output.stats.z_sum_L]
        return torch.cat([part.double() for part in parts])

    def _global_tokens(self, batches: list[Batch]) -> tuple[int, int]:
        """Tokens, and tokens with a label, of the global batch."""
        routed = sum(batch.tokens_BS.numel() for batch in batches)
        labelled = torch.stack([(batch.labels_BS != IGNORED_LABEL).sum() for batch in batches]).sum()
        both = torch.stack([torch.full_like(labelled, routed), labelled])
        dist.all_reduce(both, group=self.mesh.group("dp"))
        return tuple(both.tolist())

    def _recompute(self) -> Recompute:
        config, mesh = self.config, self.mesh
        return Recompute(
            config.recompute,
            config.recompute_parts,
            budget=config.recompute_budget_gib * 2**30,
            tokens=self.micro_batch_tokens // (mesh.size("cp") * mesh.size("tp")),
            micro_batches=mesh.size("pp"),
            itemsize=self.compute_dtype.itemsize,
            tp=mesh.size("tp"),
            ep=mesh.size("ep"),
            etp=mesh.size("etp"),
        )

    def _result(self, sums: Tensor, routed: int, labelled: int, norm: Tensor) -> StepResult:
        """Everything that the host learns of a step comes in one copy: each would wait for the device anew."""
        dist.all_reduce(sums)
        if not self.is_moe:
            loss_sum, grad_norm = torch.stack([sums[0], norm.double()]).tolist()
            return StepResult(loss_sum / labelled, 0.0, 0.0, grad_norm, None)
        shape = self.previous_f_LE.shape
        stats = _unpack(sums[1:], shape)
        f_LE = load_fraction(stats.counts_LE, torch.float64)
        self.previous_f_LE.copy_(f_LE)
        balance = balance_loss(f_LE, stats.prob_sum_LE / routed).mean()
        z = (stats.z_sum_L / routed).mean()
        scalars = torch.stack([sums[0], balance, z, norm.double()])
        numbers = torch.cat([scalars, stats.counts_LE.double().flatten()]).tolist()
        loss_sum, balance_loss_, z_loss, grad_norm = numbers[:4]
        counts_LE = torch.tensor(numbers[4:], dtype=torch.float64).long().view(shape)
        return StepResult(loss_sum / labelled, balance_loss_, z_loss, grad_norm, counts_LE)


def _unpack(vector: Tensor, shape: torch.Size) -> LayerStats:
    counts, probs, z_sum_L = vector.split([shape.numel(), shape.numel(), shape[0]])
    return LayerStats(counts.round().long().view(shape), probs.view(shape), z_sum_L)


def require_finite(norm: Tensor, step: int) -> float:
    """A gradient norm as a number. The host waits for it: nothing may be changed by a broken gradient.

    Raises:
        FloatingPointError: it is not finite.
    """
    value = norm.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"step {step + 1}: the gradient norm is {value}; the weights were not changed")
    return value
