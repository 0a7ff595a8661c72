"""`megagrin kernels`: measures block sizes of the grouped products on this GPU and writes the table that training looks up.

One rank measures, all get its table: ranks with tables of their own would compute different roundings and wait for each other.
Candidates are those that tests/kernels/test_offline_compile.py compiles for each architecture. What cannot fit the shared memory
is left out before anything is launched, and a candidate whose result differs from the fallback's is refused however fast it is.

Shape suffixes: T tokens, R routed rows, E experts, D model width, F expert width, N output and K contracted features.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagrin.distributed.runtime import RuntimeConfig, session
from megagrin.kernels import tuning
from megagrin.kernels.tuning import BlockConfig, Key, Op, Table
from megagrin.kernels.tuning_candidates import CANDIDATES
from megagrin.models.grin import PRESETS
from megagrin.settings.arguments import check, option_problems, require_folder


@dataclass(frozen=True)
class LayerShape:
    """A layer to tune for."""

    tokens: int
    d_model: int
    d_ff: int
    n_experts: int
    top_k: int

    @property
    def rows(self) -> int:
        """Routed rows R."""
        return self.tokens * self.top_k


@dataclass(frozen=True)
class Product:
    """One grouped product of a layer."""

    op: Op
    n: int
    k: int
    layer: LayerShape

    def key(self, dtype: torch.dtype) -> Key:
        """Where its choice stands in a table."""
        rows = tuning.bucket(self.layer.rows // self.layer.n_experts)
        return Key(self.op, str(dtype).removeprefix("torch."), self.n, self.k, rows)

    @property
    def flops(self) -> float:
        """2·R·N·K."""
        return 2.0 * self.layer.rows * self.n * self.k


def products(layer: LayerShape) -> list[Product]:
    """The grouped products of a layer's forward and backward pass, the costly ones first."""
    d, f = layer.d_model, layer.d_ff
    listed: list[tuple[Op, int, int]] = [
        ("up_swiglu", 2 * f, d),
        ("m_grouped_dgrad", d, 2 * f),
        ("wgrad", 2 * f, d),
        ("down_dgrad", f, d),
        ("m_grouped", d, f),
        ("wgrad", d, f),
        ("wgrad_fp32", 2 * f, d),
        ("wgrad_fp32", d, f),
    ]
    return [Product(op, n, k, layer) for op, n, k in listed]


def candidates(op: Op, dtype: torch.dtype, major: int, shared_limit: int) -> list[BlockConfig]:
    """The fallback first, then what else fits the shared memory of the device (bytes of one program)."""
    others = CANDIDATES.get(major, {}).get(op, ()) if dtype.itemsize == 2 else ()
    fitting = [blocks for blocks in others if tuning.shared_bytes(op, blocks, dtype.itemsize) < shared_limit - 1024]
    return [tuning.fallback(op, dtype, major), *fitting]


# Seconds of one launch for each candidate; None for one that failed or whose result is wrong.
Measure = Callable[[Product, Sequence[BlockConfig]], Sequence[float | None]]


def tune(
    table: Table,
    layers: Sequence[LayerShape],
    dtype: torch.dtype,
    major: int,
    shared_limit: int,
    measure: Measure,
    out_of_time: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> None:
    """Fill the table with the fastest candidate of every product; stops between products when out of time."""
    for product in (product for layer in layers for product in products(layer)):
        key = product.key(dtype)
        if out_of_time():
            say(f"kernels: out of time before {key}: it keeps the fallback")
            continue
        blocks = candidates(product.op, dtype, major, shared_limit)
        seconds = measure(product, blocks)
        timed = [(time_, index) for index, time_ in enumerate(seconds) if time_ is not None]
        if not timed:
            say(f"kernels: nothing ran for {key}: it keeps the fallback")
            continue
        best_s, best = min(timed)
        table.blocks[key], table.tflops[key] = blocks[best], product.flops / best_s / 1e12
        first = seconds[0]
        gain = "" if first is None else f", {first / best_s:.3f} times the fallback"
        where = f"{product.op:<16} n {key.n:>6} k {key.k:>6} rows {key.rows:>5}"
        say(f"{where}: {table.tflops[key]:6.1f} TFLOP/s{gain}  {blocks[best]}")


def share(table: Table | None) -> Table:
    """Rank 0's table on every rank; a collective call. Without a process group, the table itself.

    Raises:
        ValueError: rank 0 has none, because it failed.
    """
    box: list[Table | None] = [table]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    if box[0] is None:
        raise ValueError("kernels tune: rank 0 measured nothing; its own message says why")
    return box[0]


class Launches:
    """Tensors of one product and its launch with any blocks."""

    def __init__(self, product: Product, dtype: torch.dtype, device: torch.device) -> None:
        layer = product.layer
        self.product, generator = product, torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        # Popularities as after training: lognormal with sigma 0.3.
        popularity_E = torch.exp(0.3 * torch.randn(layer.n_experts, generator=generator, device=device))
        expert_R = torch.multinomial(popularity_E, layer.rows, replacement=True, generator=generator)
        self.counts_E = torch.bincount(expert_R, minlength=layer.n_experts)
        is_wgrad = product.op.startswith("wgrad")
        self.x = normal(layer.rows, product.k)
        self.w = normal(layer.rows, product.n) if is_wgrad else normal(*self._weight_shape()).mul_(product.k**-0.5)
        self.outputs = self._outputs(device, dtype)
        self.extra = normal(layer.rows, 2 * product.n) if product.op == "down_dgrad" else None
        # Of down_dgrad's router gradient: one number a row and column tile, so their number depends on the blocks.
        self.parts: Tensor | None = None
        self.row_weight = torch.rand(layer.rows, generator=generator, device=device) + 0.5

    def _weight_shape(self) -> tuple[int, int, int]:
        n, k, n_experts = self.product.n, self.product.k, self.product.layer.n_experts
        transposed = self.product.op in ("m_grouped_dgrad", "down_dgrad")
        return (n_experts, k, n) if transposed else (n_experts, n, k)

    def _outputs(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        n, k, rows, n_experts = self.product.n, self.product.k, self.product.layer.rows, self.product.layer.n_experts
        if self.product.op == "wgrad_fp32":
            return [torch.zeros(n_experts, n, k, device=device)]
        shapes: dict[Op, list[tuple[int, ...]]] = {
            "wgrad": [(n_experts, n, k)],
            "up_swiglu": [(rows, n), (rows, n // 2)],
            "down_dgrad": [(rows, 2 * n), (rows, n)],
        }
        return [torch.empty(*shape, device=device, dtype=dtype) for shape in shapes.get(self.product.op, [(rows, n)])]

    def prepare(self, blocks: BlockConfig) -> Callable[[], None]:
        """A function that starts the product once; its schedule is built here, as one serves several products of a layer."""
        from megagrin.kernels import grouped_gemm_triton as gemm
        from megagrin.kernels import moe_mlp_triton as mlp

        op, rows = self.product.op, self.product.layer.rows
        schedule = gemm.build_schedule(self.counts_E, rows, blocks.block_m)
        if op in ("m_grouped", "m_grouped_dgrad"):
            launch = gemm.m_grouped_launch(self.x, self.w, self.outputs[0], schedule, blocks, dgrad=op == "m_grouped_dgrad")
        elif op == "up_swiglu":
            h, act = self.outputs
            launch = mlp.up_swiglu_launch(self.x, None, self.w, self.row_weight, h, act, schedule, blocks)
        elif op == "down_dgrad":
            assert self.extra is not None
            self.parts = torch.empty(rows, -(-self.product.n // blocks.block_n), device=self.x.device)
            inputs, (dh, act) = (self.x, self.w, self.extra, self.row_weight), self.outputs
            launch = mlp.down_dgrad_launch(*inputs, dh, act, self.parts, schedule, blocks)
        else:
            accumulate = op == "wgrad_fp32"
            launch = gemm.wgrad_launch(self.w, self.x, self.outputs[0], schedule.offsets, blocks, accumulate)
        return launch.run

    def reset(self) -> None:
        """Outputs that are added to start from zero again; the others are overwritten."""
        if self.product.op == "wgrad_fp32":
            self.outputs[0].zero_()

    def poison(self) -> None:
        """Like `reset`, and what is overwritten holds NaN: an element that a candidate leaves out is not the fallback's."""
        self.reset()
        if self.product.op != "wgrad_fp32":
            for output in (*self.outputs, *([] if self.parts is None else [self.parts])):
                output.fill_(torch.nan)

    def results(self) -> list[Tensor]:
        """All that the launch which was prepared last has computed."""
        return [*self.outputs, *([] if self.parts is None else [self.parts.sum(1)])]


# Relative distance of a candidate's result from the fallback's: the order of an fp32 sum differs, then bf16 rounds.
_SAME_RESULT = 5e-3


class CudaMeasure:
    """Medians of interleaved rounds on the current GPU."""

    def __init__(self, dtype: torch.dtype, device: torch.device, rounds: int = 5, per_round: int = 3) -> None:
        self.dtype, self.device, self.rounds, self.per_round = dtype, device, rounds, per_round

    def __call__(self, product: Product, blocks: Sequence[BlockConfig]) -> list[float | None]:
        launches = Launches(product, self.dtype, self.device)
        runs = self._verified(launches, blocks)
        times: list[list[float]] = [[] for _ in blocks]
        for round_ in range(self.rounds):
            for offset in range(len(blocks)):
                index = (round_ + offset) % len(blocks)
                run = runs[index]
                if run is not None:
                    launches.reset()
                    times[index].append(self._seconds(run))
                    time.sleep(0.01)  # a power-bound GPU slows down under sustained load
        del launches, runs
        torch.cuda.empty_cache()
        return [statistics.median(values) if values else None for values in times]

    def _verified(self, launches: Launches, blocks: Sequence[BlockConfig]) -> list[Callable[[], None] | None]:
        """Launches that ran and gave the fallback's result; None for the others."""
        runs: list[Callable[[], None] | None] = []
        expected: list[Tensor] | None = None
        for candidate in blocks:
            try:
                run = launches.prepare(candidate)
                launches.poison()
                run()
                torch.cuda.synchronize(self.device)
            except Exception as error:  # a compiler's or driver's refusal has no common type across Triton's versions
                print(f"kernels: {launches.product.op} {candidate} failed: {type(error).__name__}: {str(error)[:200]}")
                runs.append(None)
                continue
            results = launches.results()
            expected = expected or [result.clone() for result in results]
            distances = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(results, expected, strict=True)]
            distance = max(distances, key=lambda d: (d != d, d))  # NaN is the largest
            if not distance <= _SAME_RESULT:
                print(f"kernels: {launches.product.op} {candidate} refused: its result is off by {distance:.2g}")
            runs.append(run if distance <= _SAME_RESULT else None)
        return runs

    def _seconds(self, run: Callable[[], None]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self.per_round):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.per_round


def _layers(options: argparse.Namespace) -> list[LayerShape]:
    if options.shape:
        return [_shape(text) for text in options.shape]
    if options.preset not in PRESETS or not PRESETS[options.preset].is_moe:
        known = ", ".join(name for name, model in PRESETS.items() if model.is_moe)
        raise ValueError(f"--preset: {options.preset} is none of {known}")
    check([f"--tokens: {tokens} must be at least 1" for tokens in options.tokens if tokens < 1])
    model = PRESETS[options.preset]
    return [LayerShape(tokens, model.d_model, model.d_ff, model.n_experts, model.top_k) for tokens in options.tokens]


def _shape(text: str) -> LayerShape:
    numbers = text.split("x")
    if len(numbers) != 5 or not all(number.isdecimal() and 0 < int(number) < 1 << 31 for number in numbers):
        raise ValueError(f"--shape: {text!r} must be TOKENSxD_MODELxD_FFxEXPERTSxTOP_K, all positive and below 2^31")
    layer = LayerShape(*map(int, numbers))
    if layer.top_k > layer.n_experts:
        raise ValueError(f"--shape: {text!r} has a top-k of {layer.top_k}, which must not exceed its {layer.n_experts} experts")
    return layer


def _parser() -> argparse.ArgumentParser:
    """argparse's own: a machine for `make gpu` need not have jsonargparse."""
    about = "Measure block sizes on this GPU and write the table."
    parser = argparse.ArgumentParser(prog="megagrin kernels tune", description=about, allow_abbrev=False)
    parser.add_argument("--preset", default="grin_16x3_8b", help="model whose layers to tune for")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="tokens of a micro-batch, with --preset")
    parser.add_argument(
        "--shape", action="append", metavar="TxDxFxExK", help="tokens, d_model, d_ff, experts, top-k in place of --preset"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder of tables (default: MEGAGRIN_TUNED)")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no further product after this time")
    return parser


def main(argv: list[str]) -> int:
    """`megagrin kernels tune`: measure on rank 0, share, write."""
    if argv and argv[0] in ("-h", "--help"):
        argv = ["tune", "--help"]
    if not argv or argv[0] != "tune":
        raise ValueError(f"kernels: {argv[0] if argv else 'nothing'} is no action; there is: tune")
    parser = _parser()
    if not {"-h", "--help"} & set(argv):
        check(list(option_problems(parser, argv[1:])))
    options = parser.parse_args(argv[1:])
    layers = _layers(options)
    if not 0 < options.seconds < float("inf"):
        raise ValueError(f"--seconds: {options.seconds} must be a positive finite number")
    if options.out is not None:
        require_folder("--out", options.out)
    if not torch.cuda.is_available():
        raise ValueError("kernels tune: torch sees no CUDA device; block sizes can only be measured on a GPU")
    with session(RuntimeConfig(device="cuda")) as runtime:
        table = None
        if runtime.is_main:
            try:
                table = _measured(layers, options, runtime.device)
            except Exception:
                if dist.get_world_size() > 1:
                    dist.broadcast_object_list([None], src=0)  # the others wait for a table
                raise
        tuning.use(share(table))
    return 0


def _measured(layers: list[LayerShape], options: argparse.Namespace, device: torch.device) -> Table:
    deadline = time.monotonic() + options.seconds
    properties: Any = torch.cuda.get_device_properties(device)  # torch's own types lack the opt-in shared memory
    gpu, version = torch.cuda.get_device_name(device), tuning.triton_version()
    path = tuning.table_path(options.out or tuning.tables_folder(), gpu, version)
    # Read before anything is measured: a damaged file is an error now, not after ten minutes.
    old = tuning.read_table(path) if path.exists() else Table(gpu, version)
    new = Table(gpu, version)
    try:
        tune(
            *(new, layers, torch.bfloat16, properties.major, properties.shared_memory_per_block_optin),
            CudaMeasure(torch.bfloat16, device),
            out_of_time=lambda: time.monotonic() > deadline,
        )
    finally:  # a run that is ended from outside leaves what it has measured
        merged = replace(new, blocks=old.blocks | new.blocks, tflops=old.tflops | new.tflops)
        if new.blocks:
            tuning.write_table(merged, path)
    print(f"kernels: {len(new.blocks)} products measured, written to {path}")
    return merged
