"""Grouped-query attention with a sliding window, per-document masks and a key-value cache.

What a query may see is decided in one place, `Reach.sees`, from the tokens' places in their sequences. A core turns it into the
mask its kernel wants and attends; cores are replaced from outside, by another kernel or by context parallelism.

Shape suffixes: B sequences, S query positions, P key positions, H query heads, G key-value heads, C head_dim, D model width.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from megagrin.nn.rope import rotate

AttentionBackend = Literal["auto", "sdpa", "flex"]


@dataclass(frozen=True)
class Reach:
    """Which keys a query may see: not later, nearer than `window` (the query's own key counts), same document.

    Attributes:
        query_S: int64 place of each query in its sequence; not its rotary position, which starts anew in each document.
        key_P: int64 place of each key in its sequence.
        window: number of keys in reach, the own one included; the convention of transformers' sliding_window.
        query_document_BS: int64 document number of each query; None where documents do not matter.
        key_document_BP: int64 document number of each key, or None.
        plain: known on the host that nothing but causality counts, and that queries are the keys in ascending order.
    """

    query_S: Tensor
    key_P: Tensor
    window: int
    query_document_BS: Tensor | None = None
    key_document_BP: Tensor | None = None
    plain: bool = False

    def sees(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether query number q of sequence b sees key number k; int64 tensors that broadcast against each other."""
        query, key = self.query_S[q], self.key_P[k]
        seen = (key <= query) & (key > query - self.window)
        if self.query_document_BS is not None and self.key_document_BP is not None:
            seen = seen & (self.query_document_BS[b, q] == self.key_document_BP[b, k])
        return seen


def sequence_reach(queries: int, keys: int, window: int, documents_BS: Tensor | None, device: torch.device) -> Reach:
    """Reach over a whole sequence, whose last `queries` positions ask; documents not together with earlier keys."""
    key_P = torch.arange(keys, device=device)
    plain = documents_BS is None and window >= keys and queries == keys
    return Reach(key_P[keys - queries :], key_P, window, documents_BS, documents_BS, plain)


def attention_mask(queries: int, keys: int, window: int, documents_BS: Tensor | None, device: torch.device) -> Tensor | None:
    """The mask of `SdpaCore` over a whole sequence; arguments as in `sequence_reach`."""
    return SdpaCore().mask(sequence_reach(queries, keys, window, documents_BS, device))


class AttentionCore(Protocol):
    """The part of attention without parameters: a kernel and the form in which it takes a mask."""

    def mask(self, reach: Reach) -> Any:
        """The mask of a micro-batch, shared by all layers."""
        ...

    def __call__(self, q_BHSC: Tensor, k_BGPC: Tensor, v_BGPC: Tensor, mask: Any) -> Tensor:
        """Attend, scores scaled by 1/sqrt(C): (B, H, S, C)."""
        ...


class SdpaCore(nn.Module):
    """torch's scaled_dot_product_attention with a dense mask."""

    def mask(self, reach: Reach) -> Tensor | None:
        """bool (B or 1, 1, S, P), True where attention is allowed; None where plain causal attention does."""
        if reach.plain:
            return None
        device = reach.key_P.device
        b = torch.arange(1 if reach.query_document_BS is None else reach.query_document_BS.shape[0], device=device)
        q, k = torch.arange(reach.query_S.numel(), device=device), torch.arange(reach.key_P.numel(), device=device)
        return reach.sees(b.view(-1, 1, 1), q.view(-1, 1), k).view(b.numel(), 1, q.numel(), k.numel())

    def forward(self, q_BHSC: Tensor, k_BGPC: Tensor, v_BGPC: Tensor, mask: Tensor | None) -> Tensor:
        """See `AttentionCore`."""
        gqa = q_BHSC.shape[1] != k_BGPC.shape[1]
        return nn.functional.scaled_dot_product_attention(
            q_BHSC, k_BGPC, v_BGPC, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa
        )


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _fused(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A function of flex attention, compiled on CUDA; as it is, it forms the whole score matrix: for tests only."""
    return _compiled(function) if device.type == "cuda" else function


class FlexCore(SdpaCore):
    """torch's flex_attention where there is a mask: blocks of 128 × 128 that no query sees are never computed.

    On a CPU it has no backward pass.
    """

    def mask(self, reach: Reach) -> Any:
        """A BlockMask; None where plain causal attention does."""
        if reach.plain:
            return None
        from torch.nn.attention.flex_attention import create_block_mask

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return reach.sees(b, q, k)

        batch = None if reach.query_document_BS is None else reach.query_document_BS.shape[0]
        device = reach.key_P.device
        return _fused(create_block_mask, device)(seen, batch, None, reach.query_S.numel(), reach.key_P.numel(), device=device)

    def forward(self, q_BHSC: Tensor, k_BGPC: Tensor, v_BGPC: Tensor, mask: Any) -> Tensor:
        """See `AttentionCore`."""
        if mask is None:
            return super().forward(q_BHSC, k_BGPC, v_BGPC, None)
        from torch.nn.attention.flex_attention import flex_attention

        gqa = q_BHSC.shape[1] != k_BGPC.shape[1]
        return _fused(flex_attention, q_BHSC.device)(q_BHSC, k_BGPC, v_BGPC, block_mask=mask, enable_gqa=gqa)


class SequenceMask:
    """Makes the mask of a micro-batch of whole sequences. Replaced together with the cores that take the mask."""

    def __init__(self, window: int, core: AttentionCore) -> None:
        self.window, self.core = window, core

    def __call__(self, queries: int, past: int, documents_BS: Tensor | None, device: torch.device) -> Any:
        """The mask of all layers for `queries` positions after `past` cached ones."""
        return self.core.mask(sequence_reach(queries, past + queries, self.window, documents_BS, device))


class KVCache:
    """Keys and values of the positions seen so far, for generation."""

    def __init__(self, n_layers: int) -> None:
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layers

    @property
    def length(self) -> int:
        """Positions held."""
        first = self._layers[0]
        return 0 if first is None else first[0].shape[2]

    def extend(self, layer: int, k_BGSC: Tensor, v_BGSC: Tensor) -> tuple[Tensor, Tensor]:
        """Append new positions to a layer and return all of them."""
        held = self._layers[layer]
        if held is not None:
            k_BGSC, v_BGSC = torch.cat((held[0], k_BGSC), dim=2), torch.cat((held[1], v_BGSC), dim=2)
        self._layers[layer] = (k_BGSC, v_BGSC)
        return k_BGSC, v_BGSC


class Attention(nn.Module):
    """Grouped-query attention: n_heads query heads share n_kv_heads key-value heads."""

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, head_dim: int, bias: bool, layer: int) -> None:
        super().__init__()
        self.head_dim, self.layer = head_dim, layer
        self.q_proj = nn.Linear(d_model, n_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(n_heads * head_dim, d_model, bias=bias)
        self.core: AttentionCore = SdpaCore()

    def _heads(self, x_BSX: Tensor) -> Tensor:
        return x_BSX.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], mask: Any, cache: KVCache | None = None) -> Tensor:
        """Attend within each sequence.

        Args:
            x_BSD: normalised hidden states.
            rope: cos and sin of the positions, from `rope_table`.
            mask: from `mask` of the core.
            cache: extended with this call's keys and values.

        Returns:
            (B, S, D) without the residual.
        """
        q_BHSC = rotate(self._heads(self.q_proj(x_BSD)), *rope)
        k_BGPC = rotate(self._heads(self.k_proj(x_BSD)), *rope)
        v_BGPC = self._heads(self.v_proj(x_BSD))
        if cache is not None:
            k_BGPC, v_BGPC = cache.extend(self.layer, k_BGPC, v_BGPC)
        out_BHSC = self.core(q_BHSC, k_BGPC, v_BGPC, mask)
        return self.o_proj(out_BHSC.transpose(1, 2).flatten(2))


def attention_layers(model: nn.Module) -> list[Attention]:
    """The model's attention modules in order."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def backend_problem(backend: AttentionBackend, device_type: str) -> str:
    """Why a kernel of attention cannot be had on a kind of device, as `field: value and rule`; empty when it can."""
    if backend == "flex" and device_type != "cuda":
        return f"engine.attention: flex needs a CUDA device, this is {device_type}; take sdpa or auto"
    return ""


def use_backend(
    layers: list[Attention], mask: SequenceMask, backend: AttentionBackend, device: torch.device, dtype: torch.dtype
) -> None:
    """Let a model's attention modules attend by a kernel.

    Args:
        layers: the modules.
        mask: of the model.
        backend: `auto` takes flex where it is at home, bf16 on CUDA and heads of 16 at least: a dense mask keeps SDPA from flash.
        device: of the tensors.
        dtype: of the tensors.

    Raises:
        ValueError: flex without CUDA, where it has no backward pass.
    """
    if problem := backend_problem(backend, device.type):
        raise ValueError(problem)
    at_home = device.type == "cuda" and dtype == torch.bfloat16 and all(layer.head_dim >= 16 for layer in layers)
    core = FlexCore if backend == "flex" or (backend == "auto" and at_home) else SdpaCore
    for attention in layers:
        attention.core = core()
    mask.core = core()
