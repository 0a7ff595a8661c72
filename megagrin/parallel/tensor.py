"""Tensor and sequence parallelism: every dense matrix cut over the tp ranks, and the sequence between the matrices.

Between sublayers hidden states are (B, s, D): tp rank t holds slice t of the sequence, so norms, residuals, router and dispatch
run on tokens of their own. A sublayer gathers the sequence once, computes with its columns (whole heads, or a part of d_ff), and
its last matrix, cut along rows, leaves partial sums that are summed and scattered back over the sequence. Communication per
sublayer and direction: one all-gather and one reduce-scatter of B·S·D·(tp − 1)/tp elements.

Matrices are stored as DTensors over the tp axis, so that FSDP2 and checkpoints know their place, and computed with as local
tensors. What has one dimension only stays whole on every rank and is sliced where it is used: FSDP2 needs a dimension of its own.
`TABLE` says what happens to which module; nothing else in the model knows.

Shape suffixes: B sequences, S positions (s of one rank), D model width, V vocabulary (v rows of one rank).
"""

import fnmatch
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Shard

from megagrin.distributed.comm import (
    all_gather_last_dim,
    all_gather_sequence,
    local_tensor,
    reduce_scatter_sequence,
    slice_replicated,
)
from megagrin.distributed.mesh import ParallelMesh
from megagrin.kernels.cross_entropy import VocabShard, linear_cross_entropy
from megagrin.models.transformer import LMHead


def shard_rows(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """First row and number of rows of a rank, as DTensor's Shard cuts: blocks of ⌈rows/ranks⌉, the last ones short or empty."""
    block = -(-rows // ranks)
    first = min(rows, rank * block)
    return first, min(rows, first + block) - first


def sequence_slice(x_BS: Tensor, mesh: ParallelMesh) -> Tensor:
    """The positions whose hidden states this tp rank holds between sublayers."""
    return x_BS.chunk(mesh.size("tp"), dim=1)[mesh.rank("tp")]


def _cut(parameter: Tensor, dim: int, mesh: ParallelMesh) -> nn.Parameter:
    assert parameter.is_meta
    shape = list(parameter.shape)
    shape[dim] = shard_rows(shape[dim], mesh.size("tp"), mesh.rank("tp"))[1]
    local = torch.empty(shape, dtype=parameter.dtype, device="meta")
    place: list[Placement] = [Shard(dim)]
    whole, stride = parameter.shape, parameter.stride()  # given, because an uneven cut does not tell them
    return nn.Parameter(DTensor.from_local(local, mesh.dense["tp"], place, run_check=False, shape=whole, stride=stride))


class ColumnLinear(nn.Module):
    """Linear layer that holds a block of its outputs."""

    def __init__(self, linear: nn.Linear, mesh: ParallelMesh) -> None:
        super().__init__()
        self.group = mesh.group("tp")
        self.first, self.rows = shard_rows(linear.out_features, mesh.size("tp"), mesh.rank("tp"))
        self.weight = _cut(linear.weight, 0, mesh)
        self.bias = linear.bias

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Whole inputs to this rank's outputs."""
        bias = None if self.bias is None else slice_replicated(self.bias, self.first, self.rows, self.group)
        return nn.functional.linear(x_BSD, local_tensor(self.weight), bias)


class RowLinear(nn.Module):
    """Linear layer that holds a block of its inputs; the sum over ranks is scattered over the sequence."""

    def __init__(self, linear: nn.Linear, mesh: ParallelMesh) -> None:
        super().__init__()
        self.group = mesh.group("tp")
        self.weight = _cut(linear.weight, 1, mesh)
        self.bias = linear.bias

    def forward(self, x_BSX: Tensor) -> Tensor:
        """This rank's inputs, whole sequence, to whole outputs of its slice: (B, s, D)."""
        return reduce_scatter_sequence(nn.functional.linear(x_BSX, local_tensor(self.weight)), self.group, self.bias)


def _cut_vocabulary(weight: Tensor, mesh: ParallelMesh) -> Tensor:
    """Cut unless that leaves a rank with nothing, which FSDP2 cannot shard; such a vocabulary is small enough to stay whole."""
    last = mesh.size("tp") - 1
    return _cut(weight, 0, mesh) if shard_rows(weight.shape[0], mesh.size("tp"), last)[1] else weight


def _vocabulary_rows(weight: Tensor, first: int, rows: int, group: dist.ProcessGroup) -> Tensor:
    local = local_tensor(weight)
    return local if local.shape[0] == rows else slice_replicated(local, first, rows, group)


class VocabEmbedding(nn.Module):
    """Embedding that holds a block of the vocabulary, none of it where there are more ranks than pieces."""

    def __init__(self, embedding: nn.Embedding, mesh: ParallelMesh) -> None:
        super().__init__()
        self.group = mesh.group("tp")
        self.first, self.rows = shard_rows(embedding.num_embeddings, mesh.size("tp"), mesh.rank("tp"))
        self.weight = _cut_vocabulary(embedding.weight, mesh)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Whole sequences of ids to this rank's slice of their embeddings: (B, s, D). All but one summand are 0: exact."""
        weight_vD = _vocabulary_rows(self.weight, self.first, self.rows, self.group)
        if self.rows == 0:
            # The sum of nothing keeps the parameter in the graph: every rank must bring a gradient.
            x_BSD = weight_vD.new_zeros(*tokens_BS.shape, weight_vD.shape[1]) + weight_vD.sum()
        else:
            outside_BS = (tokens_BS < self.first) | (tokens_BS >= self.first + self.rows)
            x_BSD = nn.functional.embedding((tokens_BS - self.first).masked_fill(outside_BS, 0), weight_vD)
            x_BSD = x_BSD.masked_fill(outside_BS.unsqueeze(-1), 0)
        return reduce_scatter_sequence(x_BSD, self.group)


class VocabHead(nn.Module):
    """Language-model head that holds a block of the vocabulary."""

    def __init__(self, head: LMHead, mesh: ParallelMesh) -> None:
        super().__init__()
        self.group, self.vocab_size = mesh.group("tp"), head.weight.shape[0]
        self.first, self.rows = shard_rows(self.vocab_size, mesh.size("tp"), mesh.rank("tp"))
        self.weight = _cut_vocabulary(head.weight, mesh)
        self.bias = head.bias

    def forward(self, x_BsD: Tensor, labels_BS: Tensor | None) -> Tensor:
        """The summed cross entropy of the whole sequence, equal on all tp ranks; without labels its logits (B, S, V).

        Of a slice of last positions (`last_only`) it returns every rank's; the last one is the sequence's.
        """
        x_BSD = all_gather_sequence(x_BsD, self.group)
        weight_vD = _vocabulary_rows(self.weight, self.first, self.rows, self.group)
        bias_v = None if self.bias is None else slice_replicated(self.bias, self.first, self.rows, self.group)
        if labels_BS is None:
            block = shard_rows(self.vocab_size, dist.get_world_size(self.group), 0)[1]
            logits_BSv = nn.functional.linear(x_BSD, weight_vD, bias_v)
            return all_gather_last_dim(nn.functional.pad(logits_BSv, (0, block - self.rows)), self.group)[..., : self.vocab_size]
        shard = VocabShard(self.first, self.group)
        return linear_cross_entropy(x_BSD.flatten(0, 1), weight_vD, bias_v, labels_BS.flatten(), shard)


def _gather_input(module: nn.Module, mesh: ParallelMesh) -> nn.Module:
    """Give a sublayer the whole sequence; its matrices then share one gathered copy."""
    group = mesh.group("tp")

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (all_gather_sequence(args[0], group), *args[1:])

    module.register_forward_pre_hook(gather)
    return module


TABLE: tuple[tuple[str, Callable[[Any, ParallelMesh], nn.Module]], ...] = (
    ("embed", VocabEmbedding),
    ("layers.*.attention", _gather_input),
    ("layers.*.attention.[qkv]_proj", ColumnLinear),
    ("layers.*.attention.o_proj", RowLinear),
    ("layers.*.mlp", _gather_input),
    ("layers.*.mlp.gate_proj", ColumnLinear),
    ("layers.*.mlp.up_proj", ColumnLinear),
    ("layers.*.mlp.down_proj", RowLinear),
    ("lm_head", VocabHead),
)


def shard_tensors(model: nn.Module, mesh: ParallelMesh) -> None:
    """Replace every module that `TABLE` names by its tensor-parallel form; the model must be on the meta device."""
    for path, module in list(model.named_modules()):
        for pattern, style in TABLE:
            if fnmatch.fnmatchcase(path, pattern) and (new := style(module, mesh)) is not module:
                model.set_submodule(path, new)
