"""Context parallelism: the ranks of the cp axis share every sequence, and only attention notices.

A sequence is cut into 2·cp chunks and rank c takes chunks c and 2·cp − 1 − c: under a causal mask an early and a late chunk
together cost the same everywhere. What travels with a token (label, rotary position, document, the index its random draws hang
on) is sliced with it, so everything but attention runs on as if the sequences were shorter.

Two ways to attend. `all_gather`: keys and values of all ranks come to each rank, whose queries see the part up to their own
chunk; the gradients go home by reduce-scatter. `ulysses`: all-to-all swaps sequence for heads, each rank attends over whole
sequences with its share of the heads, and swaps back (arXiv 2309.14509).

Shape suffixes: B sequences, S positions of this rank, P positions of the sequence, N = 2·cp chunks, M positions of a chunk,
R ranks, H query heads, G key-value heads, X any heads, C head_dim, … more dimensions.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagrin.data.loader import Batch
from megagrin.distributed.comm import gather_stacked, swap_blocks
from megagrin.distributed.mesh import ParallelMesh
from megagrin.models.transformer import Transformer
from megagrin.nn.attention import AttentionCore, Reach, SequenceMask, attention_layers


def own_chunks(ranks: int, rank: int) -> tuple[int, int]:
    """The two chunks of a rank, counted along the sequence."""
    return rank, 2 * ranks - 1 - rank


def slice_sequence(x_BP: Tensor, ranks: int, rank: int) -> Tensor:
    """This rank's positions of whole sequences, (B, P) -> (B, P/ranks); P must be a multiple of 2·ranks."""
    x_BNM = x_BP.unflatten(1, (2 * ranks, -1))
    return torch.cat([x_BNM[:, chunk] for chunk in own_chunks(ranks, rank)], dim=1)


def slice_batch(batch: Batch, mesh: ParallelMesh) -> Batch:
    """The part of a micro-batch that this rank trains on: every field cut along the sequence."""
    ranks = mesh.size("cp")
    if ranks == 1:
        return batch
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(
        batch, **{name: slice_sequence(value, ranks, mesh.rank("cp")) for name, value in values.items() if value is not None}
    )


def in_sequence_order(stacked: Tensor) -> Tensor:
    """Slices of all ranks to whole sequences: (R, B, X, S, C) -> (B, X, P, C)."""
    early, late = stacked.unflatten(3, (2, -1)).unbind(3)
    chunks_NBXMC = torch.cat([early, late.flip(0)])
    return chunks_NBXMC.permute(1, 2, 0, 3, 4).flatten(2, 3)


def by_rank(x_BXPC: Tensor, ranks: int) -> Tensor:
    """Whole sequences to the slices of all ranks: (B, X, P, C) -> (R, B, X, S, C)."""
    chunks_NBXMC = x_BXPC.unflatten(2, (2 * ranks, -1)).permute(2, 0, 1, 3, 4)
    early, late = chunks_NBXMC.chunk(2)
    return torch.stack([early, late.flip(0)], dim=3).flatten(3, 4)


@dataclass(frozen=True)
class _ChunkMask:
    """What one chunk of queries sees: keys [start, stop) of the sequence, by `mask`."""

    start: int
    stop: int
    mask: Any


class _ContextMask(SequenceMask):
    """The queries are this rank's two chunks."""

    def __init__(self, window: int, core: AttentionCore, group: dist.ProcessGroup) -> None:
        super().__init__(window, core)
        self.group = group
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def __call__(self, queries: int, past: int, documents_BS: Tensor | None, device: torch.device) -> Any:
        if past:
            raise ValueError(f"parallel.cp: {self.ranks} ranks cannot share a key-value cache; generate with parallel.cp=1")
        place_P = torch.arange(queries * self.ranks, device=device)
        documents_BP = None if documents_BS is None else self._whole(documents_BS)
        return self._masks(place_P, documents_BP)

    def _whole(self, documents_BS: Tensor) -> Tensor:
        return in_sequence_order(gather_stacked(documents_BS[:, None, :, None], self.group))[:, 0, :, 0]

    def _masks(self, place_P: Tensor, documents_BP: Tensor | None) -> Any:
        raise NotImplementedError


class AllGatherMask(_ContextMask):
    """Masks of this rank's two chunks of queries, each over the keys between its window's far end and its own last one."""

    def _masks(self, place_P: Tensor, documents_BP: Tensor | None) -> list[_ChunkMask]:
        length = place_P.numel() // (2 * self.ranks)
        masks = []
        for chunk in own_chunks(self.ranks, self.rank):
            first, stop = chunk * length, (chunk + 1) * length
            start = max(0, first - self.window + 1)
            query, key = slice(first, stop), slice(start, stop)
            plain = documents_BP is None and start == first and self.window >= length
            reach = Reach(place_P[query], place_P[key], self.window, plain=plain)
            if documents_BP is not None:
                reach = replace(reach, query_document_BS=documents_BP[:, query], key_document_BP=documents_BP[:, key])
            masks.append(_ChunkMask(start, stop, self.core.mask(reach)))
        return masks


class AllGatherCore(nn.Module):
    """Attention of this rank's queries over the keys and values of all ranks."""

    def __init__(self, core: AttentionCore, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.core, self.group = core, group

    def mask(self, reach: Reach) -> Any:
        """Of the wrapped core, for one chunk."""
        return self.core.mask(reach)

    def forward(self, q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, masks: list[_ChunkMask]) -> Tensor:
        """(B, H, S, C) of this rank's positions; one all-gather for keys and values together."""
        both = in_sequence_order(gather_stacked(torch.cat((k_BGSC, v_BGSC), dim=1), self.group))
        k_BGPC, v_BGPC = both.chunk(2, dim=1)
        out = []
        for q_BHMC, chunk in zip(q_BHSC.chunk(2, dim=2), masks, strict=True):
            keys = slice(chunk.start, chunk.stop)
            out.append(self.core(q_BHMC, k_BGPC[:, :, keys], v_BGPC[:, :, keys], chunk.mask))
        return torch.cat(out, dim=2)


class UlyssesMask(_ContextMask):
    """The mask of whole sequences."""

    def _masks(self, place_P: Tensor, documents_BP: Tensor | None) -> Any:
        plain = documents_BP is None and self.window >= place_P.numel()
        return self.core.mask(Reach(place_P, place_P, self.window, documents_BP, documents_BP, plain))


class UlyssesCore(nn.Module):
    """Attention of 1/cp of the heads over whole sequences."""

    def __init__(self, core: AttentionCore, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.core, self.group, self.ranks = core, group, dist.get_world_size(group)

    def mask(self, reach: Reach) -> Any:
        """Of the wrapped core."""
        return self.core.mask(reach)

    def _swap(self, stacked: Tensor) -> Tensor:
        """Block r of dimension 0 to rank r."""
        return swap_blocks(stacked, self.group)

    def _whole_sequence(self, x_BXSC: Tensor) -> Tensor:
        return in_sequence_order(self._swap(x_BXSC.unflatten(1, (self.ranks, -1)).transpose(0, 1)))

    def forward(self, q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, mask: Any) -> Tensor:
        """(B, H, S, C) of this rank's positions."""
        q, k, v = (self._whole_sequence(x) for x in (q_BHSC, k_BGSC, v_BGSC))
        out_RBXSC = self._swap(by_rank(self.core(q, k, v, mask), self.ranks))
        return out_RBXSC.transpose(0, 1).flatten(1, 2)


def shard_context(model: Transformer, mesh: ParallelMesh, method: str) -> None:
    """Let attention reach over the sequence slices of the cp ranks; the engine slices batches by `slice_batch`.

    Args:
        model: its attention cores are wrapped, whatever they are.
        mesh: its cp axis shares sequences.
        method: all_gather or ulysses; ulysses needs heads and key-value heads of this rank that divide by cp.
    """
    group = mesh.group("cp")
    make_mask, make_core = (UlyssesMask, UlyssesCore) if method == "ulysses" else (AllGatherMask, AllGatherCore)
    model.attention_mask = make_mask(model.attention_mask.window, model.attention_mask.core, group)
    for attention in attention_layers(model):
        attention.core = make_core(attention.core, group)
