"""What a layout sends: the bytes that leave one rank in one optimizer step, collective by collective.

Each function is one dimension's formula, derived in docs/parallelism.md. tests/planning/test_cost.py counts the bytes of the real
collectives of a training step and finds the same numbers. They are volumes, not times: what overlaps with computation, and how
fast links are, is not in them. Left out: padding of parameters that do not divide evenly (fewer rows than ranks, per tensor),
checkpoints and evaluation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megagrin.distributed.mesh import ParallelConfig
from megagrin.models.transformer import ModelConfig

Op = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"]
INT64 = FP64 = 8
FP32 = 4


def sent(op: Op, buffer: float, ranks: int) -> float:
    """Bytes that leave one rank in one collective; the least that any algorithm sends, and what a ring sends.

    Args:
        op: an all-reduce is a reduce-scatter and an all-gather.
        buffer: bytes of the gathered buffer, of the whole input of a reduction, of the rows that this rank hands in to an
            all-to-all (assumed to be for all ranks equally), or of the message.
        ranks: size of the group.
    """
    if op == "send":
        return buffer
    return buffer * (ranks - 1) / ranks * (2 if op == "all_reduce" else 1)


@dataclass(frozen=True)
class Traffic:
    """One kind of communication.

    Attributes:
        axis: the group, by its axis in the mesh; `dense`, `expert` and `copies` are the data-parallel ones.
        what: what travels.
        op: the collective.
        buffer: bytes of one call, see `sent`.
        ranks: size of the group.
        calls: calls per rank and optimizer step.
    """

    axis: str
    what: str
    op: Op
    buffer: float
    ranks: int
    calls: float

    @property
    def bytes(self) -> float:
        """Bytes that leave a rank in an optimizer step."""
        return self.calls * sent(self.op, self.buffer, self.ranks)


@dataclass(frozen=True)
class Workload:
    """What one rank computes in an optimizer step.

    Attributes:
        model: shape of the model.
        parallel: degrees.
        world_size: ranks of the job.
        seq_len: tokens per sequence (S).
        micro_batch_size: sequences per forward pass (B).
        micro_batches: of this rank in a step (m).
        layers: of this rank, over all its pipeline stages.
        stages: of this rank (v).
        embedding: this rank holds the embedding.
        head: this rank holds final norm and output projection.
        compute_bytes: per element in matrix products and activations (b): 2 in bf16.
        master_bytes: per element of master weights and reduced gradients (g): 4 in bf16 and fp32.
        zero: `engine.zero`, what the data-parallel ranks share.
        recomputed: of the layers, how many are recomputed in backward as a whole.
        backward_weights: rows carry a second routing weight (SparseMixer).
        documents: attention stays within documents.
        muon: the optimizer is Muon.
        global_counts: `balance.scope` is `global`.
    """

    model: ModelConfig
    parallel: ParallelConfig
    world_size: int
    seq_len: int
    micro_batch_size: int
    micro_batches: int
    layers: int
    stages: int = 1
    embedding: bool = True
    head: bool = True
    compute_bytes: int = 2
    master_bytes: int = FP32
    zero: int = 3
    recomputed: int = 0
    backward_weights: bool = True
    documents: bool = False
    muon: bool = False
    global_counts: bool = False

    @property
    def blocks(self) -> int:
        """Passes of a block in a step, forward; as many backward."""
        return self.layers * self.micro_batches

    @property
    def again(self) -> int:
        """Passes of a block that are computed again."""
        return self.recomputed * self.micro_batches

    @property
    def hidden(self) -> float:
        """Bytes of the hidden states of a micro-batch that a tp group shares: B · S/cp · D · b."""
        rows = self.micro_batch_size * self.seq_len / self.parallel.cp
        return rows * self.model.d_model * self.compute_bytes

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch that live on this rank between sublayers: B · S/(cp·tp)."""
        return self.micro_batch_size * self.seq_len / (self.parallel.cp * self.parallel.tp)

    @property
    def row_weights(self) -> int:
        """Routing weights of a row."""
        return 2 if self.backward_weights else 1

    @property
    def weights(self) -> float:
        """Bytes of the routing weights of the rank's own rows."""
        return self.tokens * self.model.top_k * self.row_weights * max(FP32, self.compute_bytes)

    @property
    def routed(self) -> float:
        """Bytes of the rows that a rank's own tokens send to experts: B · S/(cp·tp) · k · D · b."""
        return self.hidden / self.parallel.tp * self.model.top_k


def tensor(w: Workload) -> list[Traffic]:
    """Attention, and the MLP of a dense model: an all-gather and a reduce-scatter of the sequence, forward and backward.

    The biases of q, k and v are whole on every rank, and so are their gradients.
    """
    model, tp = w.model, w.parallel.tp
    found = _both_ways(w, "tp", "sequence of a sublayer", w.hidden, tp, 1 if model.is_moe else 2)
    if model.attention_bias:
        biases = model.head_dim * (model.n_heads + 2 * model.n_kv_heads) * w.compute_bytes
        found.append(Traffic("tp", "gradients of q, k, v biases", "all_reduce", biases, tp, w.blocks))
    return found


def _both_ways(w: Workload, axis: str, what: str, buffer: float, ranks: int, each: int = 1) -> list[Traffic]:
    """Gathered before a computation and reduce-scattered after it, and the same in the backward pass."""
    calls = each * (2 * w.blocks + w.again)
    return [
        Traffic(axis, what, "all_gather", buffer, ranks, calls),
        Traffic(axis, what, "reduce_scatter", buffer, ranks, calls),
    ]


def vocabulary(w: Workload) -> list[Traffic]:
    """Embedding and output projection: one sequence each way each, and the softmax's statistics.

    The embedding's partial sums are scattered over the sequence and their gradient is gathered; the projection gathers its input
    and scatters the input's gradient. Its loss takes four fp32 numbers per token and rank, its bias a gradient of V elements.
    """
    ends, ranks, m = w.embedding + w.head, w.parallel.tp, w.micro_batches
    found = [
        Traffic("tp", "sequence at the vocabulary", "all_gather", w.hidden, ranks, ends * m),
        Traffic("tp", "sequence at the vocabulary", "reduce_scatter", w.hidden, ranks, ends * m),
    ]
    if w.head:
        tokens = w.micro_batch_size * w.seq_len / w.parallel.cp
        wide = max(FP32, w.compute_bytes)
        found.append(Traffic("tp", "statistics of the softmax", "all_gather", 4 * ranks * tokens * wide, ranks, m))
        if w.model.lm_head_bias:
            found.append(
                Traffic("tp", "gradient of the head's bias", "all_reduce", w.model.vocab_size * w.compute_bytes, ranks, m)
            )
    return found


def context(w: Workload) -> list[Traffic]:
    """Attention over the ranks that share a sequence.

    all_gather: keys and values of the whole sequence, their gradients back by reduce-scatter.
    ulysses: queries, keys, values and outputs of the own slice, and the gradients of all four.
    Either way every rank needs the document numbers of the whole sequence, once a micro-batch.
    """
    model, parallel = w.model, w.parallel
    head = w.micro_batch_size * w.seq_len / parallel.cp * model.head_dim / parallel.tp * w.compute_bytes
    whole = w.micro_batch_size * w.seq_len * INT64
    numbers = [Traffic("cp", "document numbers", "all_gather", whole, parallel.cp, w.micro_batches if w.documents else 0)]
    if parallel.cp_method == "ulysses":
        heads = 2 * model.n_heads + 2 * model.n_kv_heads
        return [*numbers, Traffic("cp", "q, k, v and output", "all_to_all", heads * head, parallel.cp, 2 * w.blocks + w.again)]
    keys_and_values = 2 * model.n_kv_heads * head * parallel.cp
    return [
        *numbers,
        Traffic("cp", "k and v", "all_gather", keys_and_values, parallel.cp, w.blocks + w.again),
        Traffic("cp", "gradients of k and v", "reduce_scatter", keys_and_values, parallel.cp, w.blocks),
    ]


def experts(w: Workload) -> list[Traffic]:
    """Rows to their experts and back, and the same in the backward pass; the load is taken as balanced.

    With each row travel its routing weights, once forward and once backward; before the rows one int64 per expert and chunk.
    """
    if not w.model.is_moe:
        return []
    ranks, counts = w.parallel.ep, w.model.n_experts * w.parallel.ep_chunks * INT64
    return [
        Traffic("ep", "rows of experts", "all_to_all", w.routed, ranks, 4 * w.blocks + 2 * w.again),
        Traffic("ep", "routing weights", "all_to_all", w.weights, ranks, 2 * w.blocks + w.again),
        Traffic("ep", "rows per expert", "all_to_all", counts, ranks, w.blocks + w.again),
    ]


def expert_tensor(w: Workload) -> list[Traffic]:
    """What an etp group's ranks have to compute on comes to each of them, and partial outputs are summed on the way back.

    Without ep, tokens are gathered before they become k rows each, with their experts and weights. With ep, rows are, as they
    arrived, by an all-to-all that takes unequal numbers; the load is taken as balanced.
    """
    model, ranks = w.model, w.parallel.etp
    if not model.is_moe:
        return []
    if w.parallel.ep > 1:
        counts = ranks * model.n_experts * w.parallel.ep_chunks * INT64
        return [
            Traffic("etp", "rows of experts", "all_to_all", ranks * w.routed, ranks, 4 * w.blocks + 2 * w.again),
            Traffic("etp", "routing weights", "all_to_all", ranks * w.weights, ranks, 2 * w.blocks + w.again),
            Traffic("etp", "rows per expert", "all_gather", counts, ranks, w.blocks + w.again),
        ]
    choices = ranks * w.tokens * model.top_k
    one_weight = choices * max(FP32, w.compute_bytes)
    return [
        *_both_ways(w, "etp", "tokens of experts", ranks * w.hidden / w.parallel.tp, ranks),
        Traffic("etp", "experts of tokens", "all_gather", choices * INT64, ranks, w.blocks + w.again),
        Traffic("etp", "routing weights", "all_gather", one_weight * w.row_weights, ranks, w.blocks + w.again),
        Traffic("etp", "gradients of routing weights", "reduce_scatter", one_weight, ranks, w.blocks),
    ]


def pipeline(w: Workload) -> list[Traffic]:
    """Hidden states to the next stage, their gradients to the one before.

    A stage on neither end sends one of each per micro-batch; a rank that holds the first and the last stage sends one pair less.
    """
    forward = (w.stages - w.head) * w.micro_batches
    backward = (w.stages - w.embedding) * w.micro_batches
    if w.parallel.pp == 1:
        return []
    buffer = w.hidden / w.parallel.tp
    return [
        Traffic("pp", "hidden states", "send", buffer, w.parallel.pp, forward),
        Traffic("pp", "gradients of hidden states", "send", buffer, w.parallel.pp, backward),
    ]


def data(w: Workload) -> list[Traffic]:
    """Parameters gathered for use, gradients reduce-scattered, and summed over copies in hybrid sharding.

    zero 1 and 2 gather once a step, 3 twice a micro-batch (but the ends of the model and small parameters once). zero 1 reduces
    once a step, 2 and 3 in every micro-batch. A pipeline gathers and reduces once a step. Copies are summed once a step.
    """
    parallel, held = w.parallel, parameters_by_group(w)
    dense, expert = _shard_sizes(w)
    tokens = w.world_size // parallel.pp
    pipelined = parallel.pp > 1
    freed = w.zero == 3 and not pipelined
    once, twice = (w.micro_batches, 2 * w.micro_batches) if freed else (1, 1)
    reductions = 1 if w.zero == 1 or pipelined else w.micro_batches
    found = []
    for axis, what, elements, ranks, gathers, width in (
        ("expert", "experts", held.experts, expert, twice, w.compute_bytes),
        ("dense", "blocks", held.blocks, dense, twice, w.compute_bytes),
        ("dense", "embedding, final norm, head", held.ends, dense, once, w.compute_bytes),
        ("tokens", "norms", held.norms, tokens, once, w.compute_bytes),
        ("tokens", "routers", held.routers, tokens, once, w.master_bytes),
    ):
        found.append(Traffic(axis, f"parameters: {what}", "all_gather", elements * width, ranks, gathers))
        found.append(Traffic(axis, f"gradients: {what}", "reduce_scatter", elements * w.master_bytes, ranks, reductions))
        if axis != "tokens":
            shard = elements * w.master_bytes / ranks
            copies = "expert copies" if axis == "expert" else "copies"
            found.append(Traffic(copies, f"gradients: {what}", "all_reduce", shard, parallel.dp_replicate, 1))
    return found


@dataclass(frozen=True)
class HeldParameters:
    """Elements that a rank gathers for use, by the group that shards them; what tp, ep and etp cut is counted cut."""

    experts: float
    blocks: float
    ends: float
    norms: float
    routers: float


def parameters_by_group(w: Workload) -> HeldParameters:
    """How megagrin/parallel/data.py shards: norms over the whole stage with tp, routers with tp or bf16, else in their block."""
    model, parallel, layers = w.model, w.parallel, w.layers
    tp, width = parallel.tp, w.model.d_model
    heads = model.head_dim * (model.n_heads + 2 * model.n_kv_heads)
    matrices = width * (heads + model.head_dim * model.n_heads) / tp
    biases = heads + width if model.attention_bias else 0
    mlp = 0 if model.is_moe else 3 * width * model.d_ff / tp
    norms, routers = layers * 4 * width, layers * model.n_experts * width
    ends = (w.embedding + w.head) * model.vocab_size * width / tp
    ends += w.head * model.vocab_size if model.lm_head_bias else 0
    final_norm = w.head * 2 * width
    apart_norms, apart_routers = tp > 1, model.is_moe and (tp > 1 or w.compute_bytes == 2)
    return HeldParameters(
        experts=layers * 3 * width * model.d_ff * model.n_experts / (parallel.ep * parallel.etp),
        blocks=layers * (matrices + biases + mlp) + (0 if apart_norms else norms) + (0 if apart_routers else routers),
        ends=ends + (0 if apart_norms else final_norm),
        norms=norms + final_norm if apart_norms else 0,
        routers=routers if apart_routers else 0,
    )


def _shard_sizes(w: Workload) -> tuple[int, int]:
    """Ranks that shard dense parameters, and experts, within a copy."""
    parallel = w.parallel
    dense = parallel.data_parallel_size(w.world_size) * parallel.cp // parallel.dp_replicate
    return dense, parallel.expert_data_parallel_size(w.world_size) // parallel.dp_replicate


def muon(w: Workload) -> list[Traffic]:
    """Slices of matrices to whole matrices and back, once over each axis that cuts them; only Muon asks for it.

    Each time a rank hands in as much as it holds. Matrices are those of attention, experts and dense MLPs.
    """
    if not w.muon:
        return []
    model, parallel = w.model, w.parallel
    dense, expert = _shard_sizes(w)
    attention = 2 * model.d_model * model.head_dim * (model.n_heads + model.n_kv_heads)
    mlp = 0 if model.is_moe else 3 * model.d_model * model.d_ff
    own_dense = w.layers * (attention + mlp) / (parallel.tp * dense) * w.compute_bytes
    own_experts = parameters_by_group(w).experts / expert * w.compute_bytes
    return [
        Traffic(axis, "slices of matrices", "all_to_all", own, ranks, 2)
        for axis, own, ranks in (
            ("dense", own_dense, dense),
            ("tp", own_dense, parallel.tp),
            ("expert", own_experts, expert),
            ("etp", own_experts, parallel.etp),
        )
    ]


def bookkeeping(w: Workload) -> list[Traffic]:
    """Labelled tokens, loss and router statistics, clip norm: one small all-reduce each per step; expert counts if asked for.

    Recomputation ends before it would count again: nothing that backward needs comes after.
    """
    model = w.model
    statistics = 1 + (model.n_layers * (2 * model.n_experts + 1) if model.is_moe else 0)
    dp = w.parallel.data_parallel_size(w.world_size)
    counts = Traffic("tokens", "expert counts", "all_reduce", model.n_experts * INT64, w.world_size // w.parallel.pp, w.blocks)
    return [
        *([counts] if w.global_counts else []),
        Traffic("dp", "tokens and labelled tokens", "all_reduce", 2 * INT64, dp, 1),
        Traffic("world", "loss and statistics", "all_reduce", statistics * FP64, w.world_size, 1),
        Traffic("world", "clip norm", "all_reduce", FP64, w.world_size, 1),
    ]


DIMENSIONS: tuple[Callable[[Workload], list[Traffic]], ...] = (
    tensor,
    vocabulary,
    context,
    experts,
    expert_tensor,
    pipeline,
    data,
    muon,
    bookkeeping,
)


def step_traffic(w: Workload) -> list[Traffic]:
    """Everything a rank sends in an optimizer step; groups of one rank left out."""
    return [traffic for dimension in DIMENSIONS for traffic in dimension(w) if traffic.ranks > 1 and traffic.bytes > 0]
