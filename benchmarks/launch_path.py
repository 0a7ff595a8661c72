"""Host time of one MoE layer's launches, forward and backward, without a GPU: what Python and torch do before a driver is asked.

Beside it stands the time that the layer's arithmetic takes a GPU at a stated rate: where the host takes longer, the GPU waits.
The layer is tiny, so that what torch's operators compute here costs next to nothing; what is launched does not depend on the
shape. Not counted: the driver's part (see offline_launches.py), CUDA's allocator in place of malloc, the thread in which autograd
runs a backward pass on CUDA.

    python benchmarks/launch_path.py [--rounds 30] [--rate 600] [--other PATH]

--other: a second checkout, measured in a process of its own, blocks of calls of both taking turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from offline_launches import calls_of, fill_places, offline_launches
from torch import Tensor, library

from megagrin.kernels.permute import sort_by_expert, unpermute
from megagrin.moe.balance import BalanceConfig
from megagrin.moe.layer import MoELayer, TrainRouting
from megagrin.moe.router import Draws, RouterConfig

_T, _D, _F, _E, _K = 64, 64, 64, 16, 2
_CALLS = 20
# The shape that the arithmetic is counted for: GRIN's layer.
_TOKENS, _WIDTH, _EXPERT_WIDTH, _TOP_K = (4096, 8192), 4096, 6400, 2


def _layer() -> tuple[MoELayer, Tensor, TrainRouting]:
    layer = MoELayer(_D, _F, _E, _K, 0, RouterConfig(), BalanceConfig())
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.experts.to(torch.bfloat16)
    train = TrainRouting(Draws(1, 2, torch.arange(_T)), _T, torch.full((1, _E), 1 / _E))
    return layer, torch.randn(1, _T, _D).bfloat16().requires_grad_(), train


def _contestants() -> dict[str, Callable[[], object]]:
    """Name to what is timed. A part's backward is its own autograd pass, whose start the whole pays once."""
    layer, x_BSD, train = _layer()
    x_TD = x_BSD.detach().flatten(0, 1).requires_grad_()
    _, routing = layer.router(x_TD, train.draws)
    sent = layer.token_dispatch.dispatch(x_TD, routing)

    def experts() -> Tensor:
        return layer.experts(sent.x, sent.weight_R, sent.counts_L, sent.backward_weight_R, sent.plan)

    y_RD = experts()
    assert routing.sums is not None
    outputs = [layer(x_BSD, train)[0]]
    parts: dict[str, tuple[list[Tensor], list[Tensor]]] = {
        "router": ([routing.weight_TK, *routing.sums], [x_TD, layer.router.weight]),
        "weights": ([sent.weight_R], [routing.weight_TK]),
        "experts": ([y_RD], [x_TD, layer.experts.gate_up_proj, layer.experts.down_proj, sent.weight_R]),
    }
    leaf_RD = y_RD.detach().requires_grad_()
    parts["combine"] = ([unpermute(leaf_RD, sent.plan)], [leaf_RD])

    def backward(outs: list[Tensor], leaves: list[Tensor]) -> Callable[[], object]:
        grads = [torch.ones_like(out) for out in outs]
        return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)

    return {
        "forward": lambda: layer(x_BSD, train),
        "forward: router": lambda: layer.router(x_TD, train.draws),
        "forward: sort": lambda: sort_by_expert(routing.expert_TK, _E),
        "forward: sort and weights": lambda: layer.token_dispatch.dispatch(x_TD, routing),
        "forward: experts": experts,
        "forward: combine": lambda: layer.token_dispatch.combine(y_RD, sent),
        "backward": backward(outputs, [x_BSD, *layer.parameters()]),
        **{f"backward: {name}": backward(*ends) for name, ends in parts.items()},
    }


def _seconds(call: Callable[[], object]) -> float:
    # Processor time: others' load on a shared machine moves it least.
    start = time.process_time()
    for _ in range(_CALLS):
        call()
    return (time.process_time() - start) / _CALLS


def _without_launches(call: Callable[[], object]) -> float:
    from triton.runtime.jit import JITFunction

    def run(self: Any, *_args: Any, **options: Any) -> None:
        fill_places(self.fn.__name__, options.values())

    with mock.patch.object(JITFunction, "run", run):
        return _seconds(call)


def _no_descriptor(*_args: Any) -> None:
    return None


def _kinds(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of a call without Triton's launcher, and without making tensor descriptors as well."""
    from megagrin.kernels import grouped_gemm_triton as products

    with (
        mock.patch.object(products, "TensorDescriptor", mock.Mock(from_tensor=_no_descriptor)),
        mock.patch.object(products, "create_ragged_descriptor", _no_descriptor),
    ):
        bare = _without_launches(call)
    return {"without launcher": _without_launches(call), "without descriptors": bare}


def _operator_cost() -> dict[str, float]:
    """Seconds of a registered operator that does nothing, beside a plain autograd function and a call of Python."""

    out = torch.empty(4)

    def fresh(x: Tensor, y: Tensor) -> Tensor:
        return out.detach()

    op = library.custom_op("launch_path::nothing", fresh, mutates_args=())
    op.register_fake(lambda x, y: torch.empty_like(x))
    op.register_autograd(lambda ctx, grad: (grad, None), setup_context=lambda ctx, inputs, output: None)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            return fresh(x, y)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return grads[0], None

    leaf, plain = torch.empty(4, requires_grad=True), torch.empty(4)
    return {
        "registered operator, with a graph": _seconds(lambda: op(leaf, plain)),
        "autograd function": _seconds(lambda: Direct.apply(leaf, plain)),
        "registered operator, no graph": _seconds(lambda: op(plain, plain)),
        "call": _seconds(lambda: fresh(plain, plain)),
    }


def serve() -> None:
    """Answer each line of stdin with one round of measurements."""
    torch.set_num_threads(1)
    with offline_launches() as launched:
        contestants = _contestants()
        counts = {}
        for name in ("forward", "backward"):
            contestants[name]()
            found = calls_of(contestants[name], launched)
            counts[name] = [len(found.kernels), len(found.operators), found.allocations, len(found.waits)]
        for call in contestants.values():
            _seconds(call)
        print(json.dumps(counts), flush=True)
        for _ in sys.stdin:
            row = {name: _seconds(call) for name, call in contestants.items()}
            for name in ("forward", "backward"):
                row |= {f"{name}, {kind}": seconds for kind, seconds in _kinds(contestants[name]).items()}
            print(json.dumps(row | _operator_cost()), flush=True)


def _start(root: Path) -> tuple[subprocess.Popen[str], dict[str, list[int]]]:
    # This file measures every checkout; only the package comes from another.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])}
    command = [sys.executable, "-W", "ignore", __file__, "--serve"]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return process, _answer(process)


def _answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"launch_path: the measuring process ended with {process.wait()}")


def _layer_seconds(tokens: int, rate: float, backward: bool) -> float:
    return (12 if backward else 6) * tokens * _TOP_K * _WIDTH * _EXPERT_WIDTH / (rate * 1e12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rate", type=float, default=600.0, help="TFLOP/s that the layer's products are taken to run at")
    parser.add_argument("--other", type=Path, help="a checkout to compare with, measured first")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    here = Path(__file__).resolve().parents[1]
    started = [_start(root) for root in ([here] if arguments.other is None else [arguments.other.resolve(), here])]
    rows: list[list[dict[str, float]]] = [[] for _ in started]
    for round_ in range(arguments.rounds):
        for index in range(len(started)) if round_ % 2 else reversed(range(len(started))):
            stdin = started[index][0].stdin
            assert stdin is not None
            stdin.write("\n")
            stdin.flush()
            rows[index].append(_answer(started[index][0]))
    for (process, counts), measured in zip(started, rows, strict=True):
        assert process.stdin is not None
        process.stdin.close()
        print(f"kernels, operators, allocations, waits: {counts}")
        for name in measured[0]:
            values = sorted(row[name] * 1e6 for row in measured)
            print(f"{name:44s} {statistics.median(values):9.1f} us  (least {values[0]:.1f})")
    if len(rows) == 2:
        for name in rows[0][0]:
            ratios = [new[name] / old[name] for old, new in zip(*rows, strict=True)]
            print(f"{name:44s} {statistics.median(ratios):9.3f} of the other's")
    for tokens in _TOKENS:
        for name in ("forward", "backward"):
            gpu = _layer_seconds(tokens, arguments.rate, name == "backward") * 1e6
            host = statistics.median(row[name] for row in rows[-1]) * 1e6
            print(f"{tokens} tokens, {name}: products {gpu:.0f} us at {arguments.rate:g} TFLOP/s, host {host / gpu:.2f} of that")


if __name__ == "__main__":
    main()
