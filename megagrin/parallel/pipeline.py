"""Pipeline parallelism: the layers cut into stages, micro-batches passed from stage to stage.

Schedules are those of torch.distributed.pipelining. Stage s lives on pipeline rank s mod p. With p ranks, v stages a rank and m
micro-batches, ranks wait for (bubble over work):

    1f1b              (p − 1) / m          Narayanan et al., arXiv 2104.04473, section 2.2; v = 1
    interleaved_1f1b  (p − 1) / (m · v)    the same
    zero_bubble       (p − 1) / (3 · m · v)  ZB-H1 of Qi et al., arXiv 2401.10241, table 2: (p − 1)·(F + B − W) instead of
                                           (p − 1)·(F + B + W), for equal times of forward, input gradient and weight gradient

A rank keeps the activations of at most p micro-batches (1f1b, zero_bubble with v = 1), about p·(1 + (p − 1)/(p·v)) of them when
interleaved. Between two stages travel B·S/tp·D elements a micro-batch and direction.

What a stage needs beyond hidden states (tokens, labels, positions, random draws) every rank of the pipeline has itself, as they
all read the same batches: a stage looks it up by the micro-batch's number. The balance loss rides on the output of its layer, so
no loss but the cross entropy has to reach the last stage.

Shape suffixes: B sequences, S positions of this rank, D model width, L layers, E experts.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble

from megagrin.data.loader import Batch
from megagrin.distributed.mesh import ParallelConfig, ParallelMesh
from megagrin.kernels.split_backward import inputs_only
from megagrin.models.transformer import ModelConfig, Output, Part, Transformer
from megagrin.moe.layer import TrainRouting
from megagrin.planning.flops import forward_flops_per_token

MicroBatch = tuple[Batch, TrainRouting | None]


def bubble_over_work(config: ParallelConfig, micro_batches: int) -> float:
    """Time that a rank waits over the time that it works; see the head of this file."""
    share = 1 / 3 if config.pp_schedule == "zero_bubble" else 1.0
    return share * (config.pp - 1) / (micro_batches * config.pp_stages_per_rank)


def balanced_split(costs: list[float], parts: int) -> list[int]:
    """Cut a sequence into consecutive, non-empty parts so that the dearest part is as cheap as possible.

    Among those, the parts' costs have the smallest sum of squares; among these, the first cuts lie furthest to the right.

    Returns:
        How many items each part holds.

    Raises:
        ValueError: there are fewer items than parts.
    """
    n = len(costs)
    if not 1 <= parts <= n:
        raise ValueError(f"parts: {parts} must lie in [1, {n}], the number of items")
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    # best[j]: the dearest part when items [j:] are cut into the number of parts looked at so far.
    best = [before[n] - before[j] for j in range(n)] + [float("inf")]
    for _ in range(parts - 1):
        best = [
            min((max(before[i] - before[j], best[i]) for i in range(j + 1, n + 1)), default=float("inf")) for j in range(n + 1)
        ]
    limit = best[0] * (1 + 1e-12)
    return _least_squares_split(before, parts, limit)


def _least_squares_split(before: list[float], parts: int, limit: float) -> list[int]:
    """The split with the smallest sum of squares among those without a part above `limit`."""
    n = len(before) - 1
    worst = float("inf")
    squares = [0.0 if j == n else worst for j in range(n + 1)]
    cuts: list[list[int]] = []
    for _ in range(parts):
        scored = [
            min(
                ((squares[i] + (before[i] - before[j]) ** 2, -i) for i in range(j + 1, n + 1) if before[i] - before[j] <= limit),
                default=(worst, -n),
            )
            for j in range(n + 1)
        ]
        squares = [score for score, _ in scored]
        cuts.append([-end for _, end in scored])
    sizes, start = [], 0
    for ends in reversed(cuts):
        sizes.append(ends[start] - start)
        start = ends[start]
    return sizes


def stage_parts(model: ModelConfig, config: ParallelConfig) -> list[Part]:
    """The parts of the model, one for each stage.

    Without `pp_split`, stages are balanced by forward FLOPs per token at the longest sequence; the embedding costs none.
    """
    stages = config.pp_stages
    if stages == 1:
        return [Part(range(model.n_layers))]
    if config.pp_split is not None:
        layers = list(config.pp_split)
    else:
        terms = forward_flops_per_token(replace(model, n_layers=1), model.max_positions)
        head = terms.pop("lm_head")
        layers = balanced_split([0.0, *[sum(terms.values())] * model.n_layers, head], stages)
        layers[0] -= 1
        layers[-1] -= 1
    starts = [sum(layers[:stage]) for stage in range(stages)]
    return [
        Part(range(start, start + count), stage == 0, stage == stages - 1)
        for stage, (start, count) in enumerate(zip(starts, layers, strict=True))
    ]


def describe_parts(parts: list[Part]) -> str:
    """Stages in a line: `embed, 0-7 | 8-15 | 16-23, head`."""
    names = []
    for part in parts:
        numbers = [f"{part.layers.start}-{part.layers.stop - 1}"] if len(part.layers) > 1 else [str(n) for n in part.layers]
        names.append(", ".join(["embed"] * part.embed + numbers + ["head"] * part.head))
    return " | ".join(names)


class Stages(nn.ModuleList):
    """The parts of the model that one rank holds, in order. Parameters have the names that they have in the whole model."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of all stages; no two stages share a name."""
        for stage in self:
            yield from stage.named_parameters(prefix, recurse, remove_duplicate)


class _Stage(PipelineStage):
    """A part of the model in a schedule: looks up what else the micro-batch brings, and keeps what it came to."""

    submod: Transformer
    inputs: list[MicroBatch]
    divisor: int
    outputs: list[Output]

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the part; `index` says on which micro-batch."""
        hidden_BSD = args[0] if args else None
        output = run_part(self.submod, self.inputs[int(kwargs["index"])], hidden_BSD)
        loss = None if output.loss_sum is None else output.loss_sum.detach()
        self.outputs.append(Output(loss, None, output.stats))
        if output.loss_sum is not None:
            return output.loss_sum / self.divisor
        assert output.hidden_BSD is not None
        return output.hidden_BSD.contiguous()

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """All gradients of a micro-batch, or those of inputs only."""
        with contextlib.nullcontext() if full_backward else inputs_only():
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Weight gradients of a micro-batch, added up in fp32."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        if isinstance(self.submod, FSDPModule):
            # Weight gradients are taken by autograd.grad, which FSDP does not see: without this call, which ends every ordinary
            # backward pass, they would add up in the dtype of the products. Nothing is reduced before REDUCE_GRAD.
            fully_shard.state(self.submod)._root_post_backward_final_callback()  # type: ignore[attr-defined]


def run_part(model: nn.Module, micro_batch: MicroBatch, hidden_BSD: Tensor | None = None) -> Output:
    """Forward pass of a part of the model, or of the whole."""
    batch, train = micro_batch
    if hidden_BSD is not None and hidden_BSD.requires_grad:
        # Its gradient is sent as it is, and only dense tensors can be sent. On a view: the buffer itself lives on.
        hidden_BSD = hidden_BSD.view_as(hidden_BSD)
        hidden_BSD.register_hook(torch.Tensor.contiguous)
    output: Output = model(batch.tokens_BS, batch.labels_BS, batch.positions_BS, batch.documents_BS, train, hidden_BSD=hidden_BSD)
    return output


class Pipeline:
    """Runs the micro-batches of a step through this rank's stages, together with the other ranks of the pipeline."""

    def __init__(self, stages: list[Transformer], mesh: ParallelMesh, compute_dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.group, self.device = mesh.config, mesh.group("pp"), device
        self.rank, self.ranks = mesh.rank("pp"), mesh.size("pp")
        self.n_stages = mesh.config.pp_stages
        self.models = {self.rank + local * self.ranks: stage for local, stage in enumerate(stages)}
        self.d_model, self.dtype = stages[0].config.d_model, compute_dtype
        self.sequence_shards = mesh.size("tp")
        self._built: tuple[Any, list[_Stage], Any] | None = None

    def train(self, inputs: list[MicroBatch], divisor: int) -> list[Output]:
        """Forward and backward of every micro-batch; gradients are reduced over ranks once, after the last.

        Args:
            inputs: this rank's micro-batches, all of one shape.
            divisor: the loss is divided by it before backward.

        Returns:
            Detached losses (from the last stage) and statistics, one a stage and micro-batch.
        """
        schedule, stages = self._schedule(len(inputs), self._hidden_shape(inputs[0][0]))
        for stage in stages:
            stage.inputs, stage.divisor, stage.outputs = inputs, divisor, []
        index = torch.arange(len(inputs))
        schedule.step(index=index, target=index, return_outputs=False)
        outputs = [output for stage in stages for output in stage.outputs]
        for stage in stages:
            stage.inputs, stage.outputs = [], []
            stage.clear_runtime_states()
        return outputs

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> list[Tensor]:
        """Summed losses of the batches; empty but on the last stage.

        A wave: at time t stage s runs batch t − s, and then all exchange at once. Sends and receives of a rank go out together,
        because a rank that holds several stages sends to the ranks that it receives from.
        """
        waiting: dict[int, Tensor] = {}
        losses = []
        for time in range(len(batches) + self.n_stages - 1):
            ready: dict[int, Tensor] = {}
            for stage, model in self.models.items():
                if not 0 <= time - stage < len(batches):
                    continue
                output = run_part(model, (batches[time - stage], None), waiting.pop(stage, None))
                if output.loss_sum is not None:
                    losses.append(output.loss_sum)
                else:
                    assert output.hidden_BSD is not None
                    ready[stage] = output.hidden_BSD.contiguous()
            waiting = self._exchange(ready, batches, time)
        return losses

    def _exchange(self, ready: dict[int, Tensor], batches: list[Batch], time: int) -> dict[int, Tensor]:
        """Send every stage's output to the next stage; returns the inputs of this rank's stages."""
        received: dict[int, Tensor] = {}
        transfers = []
        for stage in range(self.n_stages - 1):  # the same order on both sides of a pair of ranks
            number = time - stage
            if not 0 <= number < len(batches):
                continue
            if stage in ready:
                peer = dist.get_global_rank(self.group, (stage + 1) % self.ranks)
                transfers.append(dist.P2POp(dist.isend, ready[stage], peer, self.group))
            if stage + 1 in self.models:
                buffer = torch.empty(self._hidden_shape(batches[number]), dtype=self.dtype, device=self.device)
                peer = dist.get_global_rank(self.group, stage % self.ranks)
                transfers.append(dist.P2POp(dist.irecv, buffer, peer, self.group))
                received[stage + 1] = buffer
        for work in dist.batch_isend_irecv(transfers) if transfers else []:
            work.wait()
        return received

    def _hidden_shape(self, batch: Batch) -> tuple[int, int, int]:
        sequences, positions = batch.tokens_BS.shape
        return sequences, positions // self.sequence_shards, self.d_model

    def _schedule(self, micro_batches: int, shape: tuple[int, int, int]) -> tuple[Any, list[_Stage]]:
        """The schedule for a number and shape of micro-batches; built anew when they change, with its buffers."""
        key = micro_batches, shape
        if self._built is None or self._built[0] != key:
            stages = [self._stage(stage, model, shape) for stage, model in self.models.items()]
            self._built = key, stages, self._new_schedule(stages, micro_batches)
        return self._built[2], self._built[1]

    def _stage(self, stage: int, model: nn.Module, shape: tuple[int, int, int]) -> _Stage:
        # Shapes given beforehand: the library would otherwise find them by an extra forward and backward pass.
        hidden_BSD = torch.empty(shape, dtype=self.dtype, device="meta", requires_grad=True)
        last = stage == self.n_stages - 1
        loss = torch.empty((), dtype=torch.promote_types(self.dtype, torch.float32), device="meta", requires_grad=True)
        return _Stage(
            model,
            stage,
            self.n_stages,
            self.device,
            input_args=() if stage == 0 else (hidden_BSD,),
            output_args=(loss if last else hidden_BSD,),
            group=self.group,
        )

    def _new_schedule(self, stages: list[_Stage], micro_batches: int) -> Any:
        options: dict[str, Any] = {"loss_fn": lambda loss, _: loss, "scale_grads": False}
        if self.config.pp_schedule == "1f1b":
            return Schedule1F1B(stages[0], micro_batches, **options)
        several: Any = {"interleaved_1f1b": ScheduleInterleaved1F1B, "zero_bubble": ScheduleInterleavedZeroBubble}
        return several[self.config.pp_schedule](stages, micro_batches, **options)
