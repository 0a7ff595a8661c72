"""The decoder: blocks of attention and MoE (or dense MLP), pre-LayerNorm, and the language-model head.

Plain single-device modules: sharding is applied from outside, by megagrin/parallel/plan.py.

Shape suffixes: B sequences, S positions, T = B·S tokens, D model width, V vocabulary, L layers of the whole model, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megagrin.kernels.cross_entropy import linear_cross_entropy
from megagrin.moe.balance import BalanceConfig
from megagrin.moe.layer import MoELayer, RouterStats, TrainRouting
from megagrin.moe.router import RouterConfig
from megagrin.nn.attention import Attention, KVCache, SdpaCore, SequenceMask
from megagrin.nn.mlp import SwiGLU
from megagrin.nn.rope import rope_table


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model.

    Attributes:
        preset: name of a preset (see `megagrin train --help`) whose values the other fields start from.
        vocab_size: rows of embedding and head; at least the tokenizer's size.
        n_layers: blocks.
        d_model: width of the residual stream.
        n_heads: query heads.
        n_kv_heads: key-value heads, a divisor of n_heads.
        head_dim: width of a head, even.
        d_ff: inner width of an expert (of the MLP in a dense model).
        n_experts: experts per layer; 0 makes a dense model.
        top_k: experts per token.
        max_positions: longest sequence.
        window: keys an attention query sees, its own included.
        rope_theta: base of the rotary frequencies.
        norm_eps: LayerNorm epsilon.
        attention_bias: biases on the q, k, v, o projections.
        lm_head_bias: bias on the output projection.
        init_std: standard deviation of initial weights; o_proj and down_proj are scaled by 1/sqrt(2·n_layers).
    """

    preset: str = "grin_tiny"
    vocab_size: int = 4096
    n_layers: int = 4
    d_model: int = 256
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 64
    d_ff: int = 192
    n_experts: int = 16
    top_k: int = 2
    max_positions: int = 1024
    window: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    attention_bias: bool = True
    lm_head_bias: bool = True
    init_std: float = 0.02

    @property
    def is_moe(self) -> bool:
        """Whether blocks hold experts."""
        return self.n_experts > 0

    def violations(self) -> list[str]:
        """Every broken rule of this section, as `field: value and rule`."""
        broken = [
            f"model.{name}: {getattr(self, name)} must be at least 1"
            for name in (
                "vocab_size",
                "n_layers",
                "d_model",
                "n_heads",
                "n_kv_heads",
                "head_dim",
                "d_ff",
                "max_positions",
                "window",
            )
            if getattr(self, name) < 1
        ]
        broken += [
            f"model.{name}: {getattr(self, name)} must be positive"
            for name in ("rope_theta", "norm_eps", "init_std")
            if not getattr(self, name) > 0
        ]
        if self.n_kv_heads > 0 and self.n_heads % self.n_kv_heads:
            broken.append(f"model.n_heads: {self.n_heads} must be a multiple of model.n_kv_heads ({self.n_kv_heads})")
        if self.head_dim % 2:
            broken.append(f"model.head_dim: {self.head_dim} must be even (rotary embedding turns pairs)")
        if self.n_experts < 0:
            broken.append(f"model.n_experts: {self.n_experts} must not be negative (0 makes a dense model)")
        if self.is_moe and not 1 <= self.top_k <= self.n_experts:
            broken.append(f"model.top_k: {self.top_k} must lie in [1, model.n_experts = {self.n_experts}]")
        return broken

    def parameter_counts(self) -> tuple[int, int]:
        """(all parameters, parameters that one token uses)."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = 2 * self.d_model * q + 2 * self.d_model * kv
        attention += (q + 2 * kv + self.d_model) if self.attention_bias else 0
        mlp, router, norms = 3 * self.d_model * self.d_ff, self.n_experts * self.d_model, 4 * self.d_model
        ends = 2 * self.vocab_size * self.d_model + (self.vocab_size if self.lm_head_bias else 0) + 2 * self.d_model
        total = self.n_layers * (attention + router + norms + mlp * max(1, self.n_experts)) + ends
        active = self.n_layers * (attention + router + norms + mlp * (self.top_k if self.is_moe else 1)) + ends
        return total, active


class Block(nn.Module):
    """x + attention(norm(x)), then x + moe(norm(x))."""

    def __init__(self, config: ModelConfig, router: RouterConfig, balance: BalanceConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.attention = Attention(
            config.d_model, config.n_heads, config.n_kv_heads, config.head_dim, config.attention_bias, layer
        )
        self.mlp_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        if config.is_moe:
            self.moe = MoELayer(config.d_model, config.d_ff, config.n_experts, config.top_k, layer, router, balance)
        else:
            self.mlp = SwiGLU(config.d_model, config.d_ff)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Any,
        train: TrainRouting | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, RouterStats | None]:
        """(B, S, D) -> (B, S, D) and the router's statistics (None in a dense block)."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope, mask, cache)
        if hasattr(self, "moe"):
            y_BSD, stats = self.moe(self.mlp_norm(x_BSD), train)
            return x_BSD + y_BSD, stats
        return x_BSD + self.mlp(self.mlp_norm(x_BSD)), None


class LMHead(nn.Module):
    """Output projection; with labels it gives the summed cross entropy and never forms all logits."""

    def __init__(self, d_model: int, vocab_size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.bias = nn.Parameter(torch.empty(vocab_size)) if bias else None

    def forward(self, x_BSD: Tensor, labels_BS: Tensor | None) -> Tensor:
        """Logits (B, S, V), or the scalar loss summed over tokens whose label is not -100."""
        if labels_BS is None:
            return nn.functional.linear(x_BSD, self.weight, self.bias)
        return linear_cross_entropy(x_BSD.flatten(0, 1), self.weight, self.bias, labels_BS.flatten())


@dataclass(frozen=True)
class Part:
    """A consecutive part of the model; the parts of a pipeline, one after the other, are the whole.

    Attributes:
        layers: numbers of its blocks, counted over the whole model; may be empty at either end.
        embed: begins with the embedding.
        head: ends with the final norm and the language-model head.
    """

    layers: range
    embed: bool = True
    head: bool = True


@dataclass(frozen=True)
class LayerStats:
    """Router statistics of all layers, summed over this micro-batch's tokens; see `RouterStats`. Zero for layers not held."""

    counts_LE: Tensor
    prob_sum_LE: Tensor
    z_sum_L: Tensor


@dataclass(frozen=True)
class Output:
    """What a forward pass returns.

    Attributes:
        loss_sum: cross entropy in nats, summed over labelled tokens; None without labels, or without the head.
        logits_BSV: None with labels, or without the head.
        stats: None in a dense model.
        hidden_BSD: what the next part goes on from; None with the head.
    """

    loss_sum: Tensor | None
    logits_BSV: Tensor | None
    stats: LayerStats | None
    hidden_BSD: Tensor | None = None


class Transformer(nn.Module):
    """Decoder-only language model or a part of it; parameters are left uninitialised, see `megagrin.models.init`.

    A part's parameters have the names that they have in the whole model.
    """

    def __init__(
        self,
        config: ModelConfig,
        router: RouterConfig | None = None,
        balance: BalanceConfig | None = None,
        part: Part | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.part = part or Part(range(config.n_layers))
        router, balance = router or RouterConfig(), balance or BalanceConfig()
        if self.part.embed:
            self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList()
        for layer in self.part.layers:  # not the list's own counting, which would begin at 0 in every part
            self.layers.add_module(str(layer), Block(config, router, balance, layer))
        if self.part.head:
            self.final_norm = nn.LayerNorm(config.d_model, config.norm_eps)
            self.lm_head = LMHead(config.d_model, config.vocab_size, config.lm_head_bias)
        self.attention_mask = SequenceMask(config.window, SdpaCore())

    def forward(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        train: TrainRouting | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        hidden_BSD: Tensor | None = None,
    ) -> Output:
        """Run the model.

        Args:
            tokens_BS: int64 token ids.
            labels_BS: int64 next tokens, -100 where none counts; None returns logits.
            positions_BS: int64 rotary positions; None counts on from the cache's length.
            documents_BS: int64 document numbers for per-document attention; None attends over the whole sequence.
            train: routing inputs of a training step; None routes deterministically.
            cache: keys and values of earlier positions, extended in place.
            last_only: logits of the last position only.
            hidden_BSD: output of the part before, in place of the embedding.
        """
        past = 0 if cache is None else cache.length
        seq = tokens_BS.shape[1]
        if positions_BS is None:
            positions_BS = torch.arange(past, past + seq, device=tokens_BS.device).unsqueeze(0)
        x_BSD = self.embed(tokens_BS) if hidden_BSD is None else hidden_BSD
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        rope = rope_table(positions_BS, self.config.head_dim, self.config.rope_theta, wide)
        mask = self.attention_mask(seq, past, documents_BS, tokens_BS.device)
        stats: list[RouterStats] = []
        for block in self.layers:
            x_BSD, layer_stats = block(x_BSD, rope, mask, train, cache)
            if layer_stats is not None:
                stats.append(layer_stats)
        all_stats = self._layer_stats(stats, x_BSD) if self.config.is_moe else None
        if not self.part.head:
            return Output(None, None, all_stats, x_BSD)
        x_BSD = self.final_norm(x_BSD[:, -1:] if last_only else x_BSD)
        out = self.lm_head(x_BSD, labels_BS)
        loss, logits = (None, out) if labels_BS is None else (out, None)
        return Output(loss, logits, all_stats)

    def _layer_stats(self, stats: list[RouterStats], x_BSD: Tensor) -> LayerStats:
        """Statistics in the rows of their layers."""
        config, held = self.config, slice(self.part.layers.start, self.part.layers.stop)
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        counts_LE = torch.zeros(config.n_layers, config.n_experts, dtype=torch.int64, device=x_BSD.device)
        prob_sum_LE = torch.zeros(counts_LE.shape, dtype=wide, device=x_BSD.device)
        z_sum_L = torch.zeros(config.n_layers, dtype=wide, device=x_BSD.device)
        if stats:
            counts_LE[held] = torch.stack([layer.counts_E for layer in stats])
            prob_sum_LE[held] = torch.stack([layer.prob_sum_E for layer in stats])
            z_sum_L[held] = torch.stack([layer.z_sum for layer in stats])
        return LayerStats(counts_LE, prob_sum_LE, z_sum_L)
