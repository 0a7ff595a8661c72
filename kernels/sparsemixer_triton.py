"""SparseMixer-v2 in Triton: one forward kernel, one that adds up its blocks' sums, one backward kernel.

A program holds BLOCK_T whole rows of logits and goes through the rounds in registers. What a draw depends on is computed from
IEEE operations alone (see `_exp`), so that it does not depend on the device; launch with `LAUNCH`, which forbids the compiler to
contract a product and a sum into one rounding.

Shape suffixes: T tokens, E experts, K experts per token, B blocks of tokens. A program's padded tile is (BLOCK_T, BLOCK_E).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile: 4 a thread. With 16, and for 67 experts on sm_80 with 8, predicates spilled.
_TILE = 512
# Few programs add up many blocks: long columns, so that a step's loads are in flight together.
_SUM_ROWS, _SUM_COLUMNS, _SUM_WARPS = 512, 8, 8
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _exp(x):
    """e^x for x ≤ 0 in additions, multiplications and a floor: the twin of `reproducible_exp`, the same bits on every device."""
    x = tl.where(x < -88.0, -88.0, x)  # not a maximum, which would lose a NaN
    exponent = tl.floor(x * 1.4426950408889634 + 0.5)
    # ln 2 in two parts; the first has 9 bits, so that its product is exact.
    rest = (x - exponent * 0.693359375) + exponent * 2.12194440054690583e-4
    y = rest * (1 / 5040) + (1 / 720)
    y = y * rest + (1 / 120)
    y = y * rest + (1 / 24)
    y = y * rest + (1 / 6)
    y = y * rest + 0.5
    y = y * rest + 1.0
    y = y * rest + 1.0
    bits = (tl.where(exponent == exponent, exponent, 0.0).to(tl.int32) + 127) << 23
    return y * bits.to(tl.float32, bitcast=True)


@triton.jit
def _normalise(e):
    """Rows of e (largest element 1) divided by their sum, which is taken in 30-bit fixed point: exact in every order."""
    finite = e == e
    total = tl.sum(tl.where(finite, e * 1073741824.0, 0.0).to(tl.int64), axis=1)
    # 0·Σe is 0 or NaN: one broken logit breaks its token's weights, as it does in a softmax.
    total = total.to(tl.float32) * 9.313225746154785e-10 + 0.0 * tl.sum(e, axis=1)
    return e * tl.div_rn(tl.full(total.shape, 1.0, tl.float32), total)[:, None]


@triton.jit
def _masked_softmax(z, free, limit, INV_TEMPERATURE: tl.constexpr, PAPER_MASK: tl.constexpr):
    """(p, the largest free logit) of one round; `free` marks what has not been drawn."""
    remaining = tl.where(free, z, -float("inf"))
    best = tl.max(remaining, axis=1)[:, None]
    gap = best - remaining
    if PAPER_MASK:
        dropped = gap > limit * (tl.abs(remaining) + tl.abs(best))
    else:
        # `/` would be an approximate division, and experts at the edge of the mask would differ from the released rule.
        dropped = tl.div_rn(gap, tl.maximum(tl.abs(remaining), best)) > limit
    kept = free & (dropped == 0)
    e = tl.where(kept, _exp((z - best) * INV_TEMPERATURE), 0.0)
    return _normalise(e), best


@triton.jit
def _sample(p, word, E: tl.constexpr):
    """`megagrin.moe.router.sample`: inverse of the cumulative sum in 30-bit fixed point, by a 32-bit word."""
    scaled = tl.where(p == p, p, 0.0) * 1073741824.0
    # Half to even: adding 2^23 leaves no fraction; from there on numbers have none.
    scaled = tl.where(scaled < 8388608.0, (scaled + 8388608.0) - 8388608.0, scaled)
    fixed = scaled.to(tl.int32)
    cumulative = tl.cumsum(fixed, axis=1)
    target = (tl.sum(fixed, axis=1).to(tl.int64) * word.to(tl.int64)) >> 32
    below = (cumulative.to(tl.int64) <= target[:, None]).to(tl.int32)
    return tl.minimum(tl.sum(below, axis=1), E - 1)


@triton.jit(do_not_specialize=["tokens", "seed", "step", "layer"])
def sparsemixer_forward(
    z_ptr,
    token_ptr,
    expert_ptr,
    weight_ptr,
    backward_weight_ptr,
    prob_part_ptr,
    z_part_ptr,
    count_part_ptr,
    tokens,
    limit,
    seed,
    step,
    layer,
    E: tl.constexpr,
    K: tl.constexpr,
    INV_TEMPERATURE: tl.constexpr,
    BERNOULLI: tl.constexpr,
    GRADIENT: tl.constexpr,
    PAPER_MASK: tl.constexpr,
    DRAW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """All K rounds for BLOCK_T tokens, and the block's share of Σ softmax(z), Σ logsumexp(z)² and the counts."""
    block = tl.program_id(0).to(tl.int64)
    row = block * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_E)[None, :]
    row_exists = row < tokens
    exists = row_exists[:, None] & (column < E)
    z = tl.load(z_ptr + row[:, None] * E + column, mask=exists, other=0.0)
    taken = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    if DRAW:
        token = tl.load(token_ptr + row, mask=row_exists, other=0)
        low, high = (token & 0xFFFFFFFF).to(tl.uint32), (token >> 32).to(tl.uint32)
        zero = tl.zeros((BLOCK_T,), tl.uint32)
    # A loop, not unrolled: eight rounds in a row would compile for a minute and spill.
    for k in range(K):
        free = (column < E) & (taken == 0)
        p, best = _masked_softmax(z, free, limit, INV_TEMPERATURE, PAPER_MASK)
        # Of equal logits the first; the last expert where a NaN leaves none.
        first = tl.min(tl.where(free & (z == best), column, E - 1), axis=1)
        if DRAW:
            k_T = tl.zeros((BLOCK_T,), tl.int32) + k
            second, odd = high | (k_T >> 1 << 16).to(tl.uint32), (k_T & 1) == 1
            third, fourth = zero + layer.to(tl.uint32), zero + step.to(tl.uint32)
            word_0, word_1, word_2, word_3 = tl.philox(seed, low, second, third, fourth)
            expert = _sample(p, tl.where(odd, word_2, word_0), E)
            full = tl.where(odd, word_3, word_1).to(tl.int64) < BERNOULLI
        else:
            expert = first
        chosen = column == expert[:, None]
        p_drawn = tl.sum(tl.where(chosen, p, 0.0), axis=1)
        weight = p_drawn
        if DRAW:
            weight = p_drawn * tl.where(full | (expert == first), 1.0, 1 / 3)
        tl.store(expert_ptr + row * K + k, expert.to(tl.int64), mask=row_exists)
        tl.store(weight_ptr + row * K + k, weight, mask=row_exists)
        tl.store(backward_weight_ptr + row * K + k, GRADIENT * p_drawn, mask=row_exists)
        taken += chosen.to(tl.int32)

    top = tl.max(tl.where(column < E, z, -float("inf")), axis=1)
    e = tl.where(column < E, _exp(z - top[:, None]), 0.0)
    total = tl.sum(e, axis=1)
    p = tl.where(row_exists[:, None], e / total[:, None], 0.0)
    logsumexp = tl.where(row_exists, top + tl.log(total), 0.0)
    part = block * E + tl.arange(0, BLOCK_E)
    tl.store(prob_part_ptr + part, tl.sum(p, axis=0), mask=tl.arange(0, BLOCK_E) < E)
    count = tl.sum(tl.where(row_exists[:, None], taken, 0), axis=0)
    tl.store(count_part_ptr + part, count, mask=tl.arange(0, BLOCK_E) < E)
    tl.store(z_part_ptr + block, tl.sum(logsumexp * logsumexp, axis=0))


@triton.jit
def sparsemixer_sums(
    prob_part_ptr,
    z_part_ptr,
    count_part_ptr,
    prob_ptr,
    z_ptr,
    count_ptr,
    blocks,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add up the blocks' shares, always in the same order: program i those of COLUMNS experts, program 0 Σ logsumexp(z)², too."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    prob = tl.zeros((ROWS, COLUMNS), tl.float32)
    count = tl.zeros((ROWS, COLUMNS), tl.int32)
    z = tl.zeros((ROWS,), tl.float32)
    for start in range(0, blocks, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * E + column[None, :]
        exists = (row < blocks)[:, None] & (column < E)[None, :]
        prob += tl.load(prob_part_ptr + at, mask=exists, other=0.0)
        count += tl.load(count_part_ptr + at, mask=exists, other=0)
        z += tl.load(z_part_ptr + row, mask=row < blocks, other=0.0)
    tl.store(prob_ptr + column, tl.sum(prob, axis=0), mask=column < E)
    tl.store(count_ptr + column, tl.sum(count, axis=0).to(tl.int64), mask=column < E)
    if tl.program_id(0) == 0:
        tl.store(z_ptr, tl.sum(z, axis=0))


@triton.jit(do_not_specialize=["tokens"])
def sparsemixer_backward(
    z_ptr,
    expert_ptr,
    d_weight_ptr,
    d_prob_ptr,
    d_z_sum_ptr,
    dz_ptr,
    tokens,
    limit,
    E: tl.constexpr,
    K: tl.constexpr,
    INV_TEMPERATURE: tl.constexpr,
    GRADIENT: tl.constexpr,
    PAPER_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dz: through each round's masked softmax with factor GRADIENT, through Σ softmax(z) and through Σ logsumexp(z)²."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_E)[None, :]
    row_exists = row < tokens
    at = row[:, None] * E + column
    exists = row_exists[:, None] & (column < E)
    z = tl.load(z_ptr + at, mask=exists, other=0.0)

    top = tl.max(tl.where(column < E, z, -float("inf")), axis=1)
    e = tl.where(column < E, _exp(z - top[:, None]), 0.0)
    total = tl.sum(e, axis=1)
    p = e / total[:, None]
    d_prob = tl.load(d_prob_ptr + column, mask=column < E, other=0.0)
    d_logsumexp = 2 * tl.load(d_z_sum_ptr) * (top + tl.log(total))
    dz = p * (d_prob - tl.sum(p * d_prob, axis=1)[:, None] + d_logsumexp[:, None])

    taken = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    for k in range(K):
        p, _best = _masked_softmax(z, (column < E) & (taken == 0), limit, INV_TEMPERATURE, PAPER_MASK)
        chosen = column == tl.load(expert_ptr + row * K + k, mask=row_exists, other=0).to(tl.int32)[:, None]
        d_weight = tl.load(d_weight_ptr + row * K + k, mask=row_exists, other=0.0)
        slope = (GRADIENT * INV_TEMPERATURE) * d_weight * tl.sum(tl.where(chosen, p, 0.0), axis=1)
        dz += slope[:, None] * (tl.where(chosen, 1.0, 0.0) - p)
        taken += chosen.to(tl.int32)
    tl.store(dz_ptr + at, dz, mask=exists)


def tile(n_experts: int) -> dict[str, int]:
    """BLOCK_T and BLOCK_E."""
    columns = triton.next_power_of_2(n_experts)
    return {"BLOCK_T": max(1, _TILE // columns), "BLOCK_E": columns}


def forward(
    z_TE: Tensor,
    token_T: Tensor | None,
    top_k: int,
    place: tuple[int, int, int],
    mask: tuple[float, bool],
    estimator: tuple[float, int, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch; arguments as in `megagrin.kernels.sparsemixer`.

    Args:
        place: (seed, step, layer).
        mask: (limit, whether by the paper's rule).
        estimator: (temperature, ⌊2^32 · P(B = 1)⌋, factor on the gradient).
    """
    n_tokens, n_experts = z_TE.shape
    blocks = tile(n_experts)
    n_blocks = triton.cdiv(n_tokens, blocks["BLOCK_T"])
    expert_TK = torch.empty(n_tokens, top_k, dtype=torch.int64, device=z_TE.device)
    weight_TK, backward_weight_TK = (torch.empty(n_tokens, top_k, dtype=torch.float32, device=z_TE.device) for _ in range(2))
    prob_E, z_sum = z_TE.new_empty(n_experts), z_TE.new_empty(())
    counts_E = torch.empty(n_experts, dtype=torch.int64, device=z_TE.device)
    if n_tokens == 0:
        return expert_TK, weight_TK, backward_weight_TK, prob_E.zero_(), z_sum.zero_(), counts_E.zero_()
    prob_BE, z_B = z_TE.new_empty(n_blocks, n_experts), z_TE.new_empty(n_blocks)
    count_BE = torch.empty(n_blocks, n_experts, dtype=torch.int32, device=z_TE.device)
    (limit, paper_mask), (temperature, bernoulli, gradient) = mask, estimator
    sparsemixer_forward[(n_blocks,)](
        z_TE,
        expert_TK if token_T is None else token_T,
        expert_TK,
        weight_TK,
        backward_weight_TK,
        prob_BE,
        z_B,
        count_BE,
        n_tokens,
        limit,
        *place,
        E=n_experts,
        K=top_k,
        INV_TEMPERATURE=1 / temperature,
        BERNOULLI=bernoulli,
        GRADIENT=gradient,
        PAPER_MASK=paper_mask,
        DRAW=token_T is not None,
        **blocks,
        **LAUNCH,
    )
    grid = (triton.cdiv(n_experts, _SUM_COLUMNS),)
    parts, sums, sizes = (prob_BE, z_B, count_BE), (prob_E, z_sum, counts_E), {"ROWS": _SUM_ROWS, "COLUMNS": _SUM_COLUMNS}
    sparsemixer_sums[grid](*parts, *sums, n_blocks, E=n_experts, **sizes, num_warps=_SUM_WARPS)
    return expert_TK, weight_TK, backward_weight_TK, prob_E, z_sum, counts_E


def backward(
    z_TE: Tensor,
    expert_TK: Tensor,
    d_weight_TK: Tensor,
    d_prob_E: Tensor,
    d_z_sum: Tensor,
    mask: tuple[float, bool],
    factors: tuple[float, float],
) -> Tensor:
    """Launch; dz (T, E).

    Args:
        mask: (limit, whether by the paper's rule).
        factors: (temperature, factor on the gradient).
    """
    (limit, paper_mask), (temperature, gradient) = mask, factors
    n_tokens, n_experts = z_TE.shape
    dz_TE = torch.empty_like(z_TE)
    blocks = tile(n_experts)
    if n_tokens > 0:
        sparsemixer_backward[(triton.cdiv(n_tokens, blocks["BLOCK_T"]),)](
            z_TE,
            expert_TK,
            d_weight_TK,
            d_prob_E,
            d_z_sum,
            dz_TE,
            n_tokens,
            limit,
            E=n_experts,
            K=expert_TK.shape[1],
            INV_TEMPERATURE=1 / temperature,
            GRADIENT=gradient,
            PAPER_MASK=paper_mask,
            **blocks,
            **LAUNCH,
        )
    return dz_TE
