"""Every rule that a run's configuration must keep. A section's own rules stand beside the section; here are those between them.

Each function below is one group of rules and returns those that are broken, as `section.field: value and rule`.
"""

from dataclasses import fields

from megagrin.engines.zero_settings import violations as kind_violations
from megagrin.settings.values import out_of_range
from megagrin.training.run_config import RunConfig


def violations(run: RunConfig, world_size: int) -> list[str]:
    """Every broken rule of every section, and of sections together, for a number of ranks."""
    beyond = dict(out_of_range(run))
    broken = [*run.train.violations(), *run.model.violations(), *run.router.violations(), *run.balance.violations()]
    broken += [*run.optim.violations(), *run.checkpoint.violations(), *run.metrics.violations()]
    broken += [*run.data.violations(), *run.runtime.violations(), *run.engine.violations()]
    broken += run.parallel.violations(world_size, run.model.n_experts)
    broken += [*kind_violations(run.engine, run.optim, run.parallel), *_empty_texts(run)]
    if not beyond:  # what follows calculates with several settings
        broken += [*_batch(run, world_size), *_sequence(run), *_schedule(run)]
        broken += [*_cuts(run, world_size), *_zero_bubble(run), *_purpose(run)]
    return [*beyond.values(), *(rule for rule in broken if rule.partition(":")[0] not in beyond)]


def _empty_texts(run: RunConfig) -> list[str]:
    """Names and paths that hold nothing, or what no path can hold."""
    broken = []
    for section in fields(run):
        for setting in fields(part := getattr(run, section.name)):
            value = getattr(part, setting.name)
            if isinstance(value, str) and (not value.strip() or "\0" in value):
                broken.append(f"{section.name}.{setting.name}: {value!r} must not be empty, nor hold a NUL character")
    return broken


def _schedule(run: RunConfig) -> list[str]:
    """Rules of the learning rate over the run's steps."""
    steps, warmup = run.train.steps, run.optim.warmup_steps
    return [f"optim.warmup_steps: {warmup} must not exceed train.steps ({steps})"] if warmup > steps >= 1 else []


def _batch(run: RunConfig, world_size: int) -> list[str]:
    """Rules of the global batch: what the ranks and the pipeline make of it."""
    train = run.train
    dp = run.parallel.data_parallel_size(world_size)
    if min(dp, train.global_batch_size, train.micro_batch_size) < 1:
        return []
    if train.global_batch_size % (dp * train.micro_batch_size):
        return [
            f"train.global_batch_size: {train.global_batch_size} must be a multiple of "
            f"data-parallel ranks × train.micro_batch_size ({dp} × {train.micro_batch_size})"
        ]
    if run.parallel.pp < 1:
        return []
    return run.parallel.pipeline_violations(run.model.n_layers, train.global_batch_size // (dp * train.micro_batch_size))


def _sequence(run: RunConfig) -> list[str]:
    """Rules of the ranks that share a sequence, as `field: value and rule`."""
    model, parallel = run.model, run.parallel
    if parallel.cp <= 1 or parallel.tp < 1:
        return []
    broken = []
    if run.train.seq_len % (2 * parallel.cp * parallel.tp):
        broken.append(
            f"train.seq_len: {run.train.seq_len} must be a multiple of 2 × parallel.cp × parallel.tp "
            f"({2 * parallel.cp * parallel.tp}): each cp rank takes an early and a late chunk, and tp cuts what it takes"
        )
    if parallel.cp_method == "ulysses":
        broken += [
            f"parallel.cp_method: ulysses needs model.{name} ({heads}) to be a multiple of parallel.cp × parallel.tp "
            f"({parallel.cp * parallel.tp}); all_gather does not"
            for name, heads in (("n_heads", model.n_heads), ("n_kv_heads", model.n_kv_heads))
            if heads % (parallel.cp * parallel.tp)
        ]
    return broken


def _cuts(run: RunConfig, world_size: int) -> list[str]:
    """Rules of matrices that are cut over ranks, as `field: value and rule`."""
    model, parallel = run.model, run.parallel
    if min(parallel.tp, parallel.cp, parallel.ep, parallel.etp, parallel.dp_replicate) < 1:
        return []
    divides = [("tp", "model.n_heads", model.n_heads), ("tp", "model.n_kv_heads", model.n_kv_heads)]
    divides.append(("etp", "model.d_ff", model.d_ff) if model.is_moe else ("tp", "model.d_ff", model.d_ff))
    if parallel.cp == 1:  # the rule of cp includes this one
        divides.append(("tp", "train.seq_len", run.train.seq_len))
    broken = [
        f"parallel.{axis}: {getattr(parallel, axis)} must divide {name} ({length})"
        for axis, name, length in divides
        if length % getattr(parallel, axis)
    ]
    # What is cut once needs a second dimension that data-parallel sharding can cut evenly.
    dense = parallel.data_parallel_size(world_size) * parallel.cp // parallel.dp_replicate
    if parallel.tp > 1 and dense and model.d_model % dense:
        broken.append(
            f"model.d_model: {model.d_model} must be a multiple of the ranks that shard each part of a matrix ({dense}); "
            "parallel.dp_replicate lowers that number"
        )
    expert = parallel.expert_data_parallel_size(world_size) // parallel.dp_replicate
    one_left = parallel.etp > 1 or (expert and model.d_ff % expert)
    if parallel.ep > 1 and expert and model.d_model % expert and one_left:
        broken.append(
            f"model.d_model: {model.d_model} must be a multiple of the ranks that shard each expert ({expert}); "
            "parallel.dp_replicate lowers that number"
        )
    return broken


def _zero_bubble(run: RunConfig) -> list[str]:
    """Rules of backward passes in two halves, as `field: value and rule`."""
    engine, broken = run.engine, []
    if run.parallel.pp <= 1 or run.parallel.pp_schedule != "zero_bubble":
        return []
    if engine.compile:
        broken.append(
            "engine.compile: true with parallel.pp_schedule zero_bubble is not possible: a compiled backward pass computes "
            "gradients of inputs and of weights together; take 1f1b or interleaved_1f1b"
        )
    if engine.recompute in ("full", "budget"):
        broken.append(
            f"engine.recompute: {engine.recompute} with parallel.pp_schedule zero_bubble would recompute a block once for "
            "its inputs and once more for each of its weights; take selective, or 1f1b or interleaved_1f1b"
        )
    return broken


def _purpose(run: RunConfig) -> list[str]:
    """Rules of what a run is for, trains on and leaves behind."""
    broken = []
    if run.checkpoint.format == "deepspeed" and run.engine.kind != "deepspeed":
        broken.append(f"checkpoint.format: deepspeed needs engine.kind deepspeed (it is {run.engine.kind})")
    if run.train.seq_len > run.model.max_positions:
        broken.append(f"train.seq_len: {run.train.seq_len} must not exceed model.max_positions ({run.model.max_positions})")
    if run.router.forced_balance and not run.train.allow_forced_balance:
        broken.append(
            "router.forced_balance: true ignores the router and is for benchmarks; "
            "set train.allow_forced_balance=true to train with it all the same"
        )
    if run.data.train is None:
        broken.append("data.train: the prefix of a token file (made by `megagrin data tokenize`) must be given")
    return broken
