"""Draws of the router that differ between a layout and the same run in one process, and what makes them rarer.

Random layouts of two and four ranks on gloo with ZeRO stages, accumulation and documents, a tiny model with six experts. Counted
are draws that differ from one process's, over all steps; the layouts with any; and the largest difference of a
loss. `expected` has no luck in it: flips per million draws that other random words would have shown on average, as far as the
first flip (tests/flips.py).

    python benchmarks/flipped_draws.py [--layouts 16] [--steps 15] [--cases fp32:0.35:plain ...]

A case is dtype:mask_eps:variant. Variants change where rounding enters: `logits64` multiplies the router's matrix in fp64 and
rounds the logits to fp32; `draw64` keeps them fp64 through softmax and draw; `reduce64` sums gradients over ranks in fp64;
`input32` gives the router the norm's output before it is rounded to bf16.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from flips import Drawn, compare_draws, drawn, random_layouts
from helpers import GlooPool

from megagrin import rng
from megagrin.moe import router
from megagrin.optim.optimizer import OptimConfig
from megagrin.parallel import data

CASES = [
    *(f"{dtype}:{eps}:plain" for dtype in ("fp64", "fp32", "bf16") for eps in ("0.01", "0.35")),
    *(f"fp32:0.35:{variant}" for variant in ("logits64", "draw64", "reduce64")),
    *(f"bf16:0.35:{variant}" for variant in ("logits64", "input32")),
]


def _route(self: router.Router, x_TD: Tensor, draws: router.Draws, rounded: bool) -> Any:
    z_TE = torch.nn.functional.linear(x_TD.double(), self.weight.double())
    z_TE = z_TE.float() if rounded else z_TE
    words_TW = rng.routing_words(draws.seed, draws.step, self.layer, draws.token_T, (self.top_k + 1) // 2)
    routing = router.sparsemixer(z_TE, self.top_k, self.config, words_TW)
    return z_TE.float(), router.Routing(routing.expert_TK, routing.weight_TK.float(), routing.backward_weight_TK)


def _draw_in_fp64(masked_TE: Tensor, word_T: Tensor) -> Tensor:
    return router.sample(torch.softmax(masked_TE.double(), -1), word_T)


class _Unrounded:
    """A norm that remembers its output before rounding, and a router that takes it where it is its own input."""

    def __init__(self) -> None:
        self.route, self.last = router.Router.forward, torch.empty(0)

    def norm(self, layer: torch.nn.LayerNorm, x: Tensor) -> Tensor:
        self.last = torch.nn.functional.layer_norm(
            x.float(), layer.normalized_shape, layer.weight.float(), layer.bias.float(), layer.eps
        )
        return self.last.to(x.dtype)

    def router(self, layer: router.Router, x_TD: Tensor, draws: router.Draws | None) -> Any:
        assert torch.equal(self.last.to(x_TD.dtype).view_as(x_TD), x_TD), "another norm came between"
        return self.route(layer, self.last.view_as(x_TD), draws)


def timed(run: Any, variant: str) -> tuple[Drawn, float]:
    """The run with a variant at work, and its processor seconds on this rank."""
    kept = router.Router.forward, router._draw, data.MixedPrecisionPolicy, torch.nn.LayerNorm.forward
    if variant == "input32":
        unrounded = _Unrounded()
        torch.nn.LayerNorm.forward = lambda layer, x: unrounded.norm(layer, x)  # type: ignore[method-assign,assignment]
        router.Router.forward = lambda layer, x, draws: unrounded.router(layer, x, draws)  # type: ignore[method-assign,assignment]
    if variant in ("logits64", "draw64"):
        router.Router.forward = functools.partialmethod(_route, rounded=variant == "logits64")  # type: ignore[assignment]
    if variant == "draw64":
        router._draw = _draw_in_fp64
    if variant == "reduce64":
        data.MixedPrecisionPolicy = functools.partial(MixedPrecisionPolicy, reduce_dtype=torch.float64)  # type: ignore[misc,assignment]
    start = time.process_time()
    try:
        return drawn(run), time.process_time() - start
    finally:
        router.Router.forward, router._draw, data.MixedPrecisionPolicy, torch.nn.LayerNorm.forward = kept  # type: ignore[method-assign,misc]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--adam_eps", type=float, default=OptimConfig().eps)
    parser.add_argument("--cases", nargs="+", default=CASES)
    options = parser.parse_args()
    pool = GlooPool()
    titles = ("dtype", "mask_eps", "variant", "draws", "flipped", "layouts with any", "expected", "masks moved", "loss", "edge")
    print("|", " | ".join(titles), "| s of one process |", flush=True)
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for case in options.cases:
        dtype, eps, variant = case.split(":")
        layouts = random_layouts(options.layouts, 0, options.steps, float(eps), dtype, options.adam_eps)
        runs = [pool.run(1, timed, layouts[0][1].reference(), variant)[0] for _ in range(3)]
        alone, seconds = runs[0][0], statistics.median(seconds for _, seconds in runs)
        flips = [compare_draws([d for d, _ in pool.run(ranks, timed, run, variant)], alone) for ranks, run in layouts]
        draws, flipped = sum(flip.draws for flip in flips), sum(flip.flipped for flip in flips)
        layouts_with, loss, edge = sum(f.flipped > 0 for f in flips), max(f.loss for f in flips), max(f.edge for f in flips)
        compared, masked = sum(flip.compared for flip in flips), sum(flip.masked for flip in flips)
        expected = 1e6 * sum(flip.expected for flip in flips) / max(compared, 1)
        cells = [
            dtype,
            eps,
            variant,
            draws,
            flipped,
            f"{layouts_with} of {len(flips)}",
            f"{expected:.3g}",
            f"{masked} of {compared}",
        ]
        print("|", " | ".join(map(str, [*cells, f"{loss:.1e}", f"{edge:.1e}", f"{seconds:.2f}"])), "|", flush=True)
    pool.close()


if __name__ == "__main__":
    main()
