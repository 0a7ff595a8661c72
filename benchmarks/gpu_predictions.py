"""The goals of `make gpu` and what it is predicted to find, written before any measurement of the present code.

Each prediction is what run C of results/2026-11-27-moe-layer-h100.md measured on one H100 with tuned blocks, or follows from its
figures as the comment says. It is a floor: what has changed since was changed to do better, and by how much is not predicted.
"""

from dataclasses import dataclass

SOURCE = "benchmarks/results/2026-11-27-moe-layer-h100.md, run C (one H100, tuned blocks), as a floor for the code as it is now"


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        where: name of a shape of moe_shapes.py; `step` or `memory`.
        quantity: what of it, a name that gpu_results.py can look up.
        text: for a reader.
        wanted: shares from 0 to 1, TFLOP/s or GiB.
        predicted: in words.
        at_most: the goal is an upper bound.
    """

    where: str
    quantity: str
    text: str
    wanted: float
    predicted: str
    at_most: bool = False

    @property
    def is_share(self) -> bool:
        """Whether it is a share, shown in per cent."""
        return self.wanted <= 1


def _of_dense(shape: str, forward: float, total: float, seen: tuple[int, int]) -> list[Goal]:
    return [
        Goal(shape, "forward_of_dense", f"{shape}: forward, of D", forward, f"{seen[0]} %"),
        Goal(shape, "total_of_dense", f"{shape}: with backward, of D", total, f"{seen[1]} %"),
    ]


# Run C gives the router's share for all shapes in one range.
_AROUND = [
    Goal(shape, "overhead_share", f"{shape}: router, permutation and combine, of the forward", 0.05, "12 to 37 %", at_most=True)
    for shape in ("grin-32k", "grin-8k", "fine-32k", "wide-32k")
]

GOALS = (
    *_of_dense("grin-32k", 0.88, 0.87, (80, 86)),
    *_of_dense("grin-8k", 0.82, 0.81, (56, 72)),
    *_of_dense("fine-32k", 0.75, 0.74, (53, 63)),
    Goal("wide-32k", "forward_tflops", "wide-32k: forward, TFLOP/s", 600.0, "557"),
    Goal("wide-32k", "backward_tflops", "wide-32k: backward, TFLOP/s", 600.0, "669"),
    *_AROUND,
    # 227 TFLOP/s in 120 ms, of which AdamW, clipping and its norm took 31 + 8.5 + 4.3 ms: a step of four micro-batches would take
    # 4 · 76 + 44 = 348 ms for four times the work.
    Goal("step", "learned_tflops", "training step, 2 full-width layers, learned routing, TFLOP/s", 500.0, "313"),
    Goal("step", "apart", "learned routing slower than forced balance by", 0.03, "1.0 %", at_most=True),
    # One micro-batch; fp32 gradients of one layer's experts, 4.7 GiB, come on top before they are added to those of the others.
    Goal("memory", "peak_gib", "largest memory peak of a stage, GiB", 70.0, "46.7, or 5 more", at_most=True),
)
