"""Grouped-query attention with a sliding window, per-document masks and a key-value cache.

Shape suffixes: B sequences, S query positions, P key positions, H query heads, G key-value heads, C head_dim, D model width.
"""

import torch
from torch import Tensor, nn

from megagrin.nn.rope import rotate


def attention_mask(queries: int, keys: int, window: int, documents_BS: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys a query may see: not later, nearer than `window` (the query's own key counts), same document.

    Args:
        queries: number of query positions S; they are the last S of the keys.
        keys: number of key positions P ≥ S.
        window: number of keys in reach, the own one included; the convention of transformers' sliding_window.
        documents_BS: int64 document number of each position, or None; not together with a cache.

    Returns:
        bool (B or 1, 1, S, P), True where attention is allowed; None where plain causal attention does.
    """
    if documents_BS is None and window >= keys and queries == keys:
        return None
    query_S1 = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    key_1P = torch.arange(keys, device=device).unsqueeze(0)
    allowed = ((key_1P <= query_S1) & (key_1P > query_S1 - window))[None, None]
    if documents_BS is not None:
        allowed = allowed & (documents_BS[:, None, :, None] == documents_BS[:, None, None, :])
    return allowed


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

    def _heads(self, x_BSX: Tensor) -> Tensor:
        return x_BSX.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None = None) -> Tensor:
        """Attend within each sequence.

        Args:
            x_BSD: normalised hidden states.
            rope: cos and sin of the positions, from `rope_table`.
            mask: from `attention_mask`; None means plain causal.
            cache: extended with this call's keys and values.

        Returns:
            (B, S, D) without the residual.
        """
        q_BHSC = rotate(self._heads(self.q_proj(x_BSD)), *rope)
        k_BGPC = rotate(self._heads(self.k_proj(x_BSD)), *rope)
        v_BGPC = self._heads(self.v_proj(x_BSD))
        if cache is not None:
            k_BGPC, v_BGPC = cache.extend(self.layer, k_BGPC, v_BGPC)
        out_BHSC = nn.functional.scaled_dot_product_attention(
            q_BHSC,
            k_BGPC,
            v_BGPC,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=q_BHSC.shape[1] != k_BGPC.shape[1],
        )
        return self.o_proj(out_BHSC.transpose(1, 2).flatten(2))
