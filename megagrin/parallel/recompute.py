"""Activation checkpointing: what backward needs is dropped after forward and computed again.

A recomputed router gives every token the experts it had: its draws are a function of (seed, step, layer, token), never of how
often or in which order it is called (megagrin/rng.py). All ranks recompute the same blocks in the same order, so collectives
inside them meet their partners.

Shape suffixes: … any.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megagrin.models.transformer import ModelConfig, Transformer
from megagrin.nn.attention import attention_layers
from megagrin.parallel.expert import PartedExperts, moe_layers

RecomputeMode = Literal["none", "full", "selective", "budget"]
RecomputePart = Literal["attention_core", "expert_mlp", "norms", "router"]


@dataclass(frozen=True)
class Recompute:
    """What to recompute.

    Attributes:
        mode: none; full, every block; selective, the parts named; budget, as few whole blocks as the budget allows.
        parts: for selective.
        budget: for budget, bytes that all blocks of this rank may keep for backward.
        tokens: for budget, tokens of a micro-batch on this rank between the blocks.
        micro_batches: for budget, how many are between their forward and their backward pass at a time.
        itemsize: for budget, bytes of a number of the compute dtype.
        tp: for budget, ranks that gather each other's tokens for attention and dense MLP.
        ep: for budget, ranks that experts are split over.
        etp: for budget, ranks that gather each other's rows for the experts.
    """

    mode: RecomputeMode = "none"
    parts: tuple[RecomputePart, ...] = ()
    budget: float = 0.0
    tokens: int = 0
    micro_batches: int = 1
    itemsize: int = 2
    tp: int = 1
    ep: int = 1
    etp: int = 1


def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward function that keeps its inputs only. No state of a random generator is saved: none is used."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


class _NormOutput:
    """A norm's output that is not kept: computed again from the norm's input, which the norm keeps anyway.

    The next module asks for it in its own backward pass. An engine has gathered the weights of that module then, not the norm's,
    and calling the norm with its hooks would gather them outside of the order in which an engine expects its modules. So the
    weights are copied while the norm runs: 2·D numbers for the T·D of its output.
    """

    def __init__(self, plain: nn.LayerNorm, norm: nn.LayerNorm, x: Tensor) -> None:
        self._x = x.detach()
        self._norm = copy.copy(plain)
        self._norm._parameters = {name: weight.detach().clone() for name, weight in norm.named_parameters()}  # type: ignore[misc]
        self._y: Tensor | None = None

    def again(self) -> Tensor:
        if self._y is None:
            with torch.no_grad():
                # The class's function: the module's own is the watched one, or compiled for another module.
                self._y = type(self._norm).forward(self._norm, self._x)
        return self._y


class _ForgetNorms:
    """Keeps the outputs of a block's norms out of what the block's other modules save.

    Checkpointing a norm would save nothing: its output is the input of a projection, which keeps it. So the block's saved
    tensors are looked through, and those that are a norm's output are replaced by the way to compute them again.
    """

    def __init__(self, block: nn.Module) -> None:
        self._outputs: dict[int, tuple[Tensor, _NormOutput]] = {}
        self._forward = block.forward
        norms: list[Any] = [module for module in block.modules() if isinstance(module, nn.LayerNorm)]
        for norm in norms:
            norm.forward = self._watched(norm, norm.forward)

    def _watched(self, norm: nn.LayerNorm, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        plain = copy.copy(norm)  # as it is before FSDP2 makes it another class, which cannot be copied

        def run(x: Tensor) -> Tensor:
            y = forward(x)
            # The tensor itself is held, too, until the block is done: its memory must not become another tensor's.
            self._outputs[y.untyped_storage().data_ptr()] = (y, _NormOutput(plain, norm, x))
            return y

        return run

    def _pack(self, tensor: Tensor) -> Any:
        held = self._outputs.get(tensor.untyped_storage().data_ptr())
        if held is None or held[0].dtype != tensor.dtype:
            return tensor
        return held[1], tensor.size(), tensor.stride(), tensor.storage_offset()

    @staticmethod
    def _unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        output, size, stride, offset = packed
        return output.again().as_strided(size, stride, offset)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward pass."""
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                return self._forward(*args, **kwargs)
        finally:
            self._outputs.clear()


def block_bytes(model: ModelConfig, tokens: int, itemsize: int, tp: int = 1, ep: int = 1, etp: int = 1) -> int:
    """Bytes that a block keeps for backward, counted from the shapes; experts are taken to be balanced over the ranks.

    Args:
        model: the model's shape.
        tokens: of a micro-batch on this rank between the blocks.
        itemsize: bytes of a number of the compute dtype.
        tp, etp: what tokens, or rows of experts, are multiplied by where matrices are cut; the cut divides widths alike.
        ep: above 1 experts keep the rows that came to them, else the tokens that they gather rows from.

    GShard's jitter, which multiplies fp32 tokens that its router then keeps, is not counted.
    """
    wide = max(4, itemsize)
    query, key_value = model.n_heads * model.head_dim, 2 * model.n_kv_heads * model.head_dim
    # Inputs and statistics of both norms and what the first one gives; query, key, value, log-sum-exp, the heads' output in
    # the kernel's order and in the projection's.
    per_token = itemsize * ((2 + tp) * model.d_model + 3 * query + key_value) + wide * (4 + model.n_heads)
    if model.is_moe:
        # The router's input, which experts on one rank gather their rows from.
        per_token += itemsize * model.d_model
        # Its logits for two losses; each draw's softmax, mask and choice.
        per_token += wide * (2 * model.n_experts + 1) + model.top_k * (model.n_experts * (wide + 1) + 8)
        # What each row becomes before the activation, its two weights, and where it came from and goes.
        per_token += model.top_k * (itemsize * 2 * model.d_ff + 2 * wide + 16)
        if ep > 1 or etp > 1:
            per_token += (model.top_k if ep > 1 else 1) * itemsize * etp * model.d_model
    else:
        per_token += itemsize * (tp * model.d_model + 4 * model.d_ff)
    return tokens * per_token


def blocks_to_recompute(kept: int, boundary: int, blocks: int, micro_batches: int, budget: float) -> int:
    """The fewest blocks to recompute so that what all blocks keep fits into a budget.

    Args:
        kept: bytes a block keeps for the backward pass of one micro-batch.
        boundary: bytes it keeps when it is recomputed: its input.
        blocks: how many there are.
        micro_batches: between their forward and their backward pass at a time.
        budget: bytes.

    Raises:
        ValueError: not even recomputing all of them would do.
    """
    for recomputed in range(blocks + 1):
        # A recomputed block keeps everything while its own backward pass runs.
        passing = kept if recomputed else 0
        if micro_batches * (recomputed * boundary + (blocks - recomputed) * kept) + passing <= budget:
            return recomputed
    need = (micro_batches * blocks * boundary + kept) / 2**30
    raise ValueError(
        f"engine.recompute_budget_gib: {budget / 2**30:.4g} is less than the {need:.4g} GiB that {blocks} blocks need "
        "when all of them are recomputed; take a smaller train.micro_batch_size or more ranks"
    )


def _recompute_parts(model: Transformer, parts: tuple[RecomputePart, ...]) -> None:
    chosen: list[Any] = []
    if "attention_core" in parts:
        chosen += [attention.core for attention in attention_layers(model)]
    if "expert_mlp" in parts:
        for experts in (layer.experts for layer in moe_layers(model)):
            if isinstance(experts, PartedExperts):
                experts.compute = checkpointed(experts.compute)  # type: ignore[method-assign]
            else:
                chosen.append(experts)
    if "router" in parts:
        chosen += [layer.router for layer in moe_layers(model)]
    for module in chosen:
        module.forward = checkpointed(module.forward)
    if "norms" in parts:
        for block in model.layers.children():
            block.forward = _ForgetNorms(block)


def apply_recompute(model: Transformer, recompute: Recompute) -> None:
    """Replace the forward functions of blocks or their parts; FSDP's hooks stay outside of what is replaced.

    Raises:
        ValueError: a budget that cannot be kept.
    """
    blocks = list(model.layers.children())
    if recompute.mode == "selective":
        _recompute_parts(model, recompute.parts)
        return
    count = len(blocks) if recompute.mode == "full" else 0
    if recompute.mode == "budget":
        kept = block_bytes(model.config, recompute.tokens, recompute.itemsize, recompute.tp, recompute.ep, recompute.etp)
        boundary = recompute.tokens * model.config.d_model * recompute.itemsize
        count = blocks_to_recompute(kept, boundary, len(blocks), recompute.micro_batches, recompute.budget)
    for block in blocks[:count]:
        block.forward = checkpointed(block.forward)
