"""grin_tiny learns one batch by heart: the shortest proof that forward, backward and optimizer fit together on a device.

    python benchmarks/tiny_training.py [--device cuda] [--steps 60] [--compile]

Ends with status 1 where the loss has not fallen.
"""

import argparse
import faulthandler
import sys

import torch
from model_step import batch, build_engine

from megagrin.distributed.runtime import RuntimeConfig, session
from megagrin.models.grin import GRIN_TINY


def main(argv: list[str]) -> int:
    """Train, print the losses, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--compile", action="store_true", help="torch.compile attention, norms and dense MLPs")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("tiny_training: torch sees no CUDA device; --device cpu", file=sys.stderr)
        return 2
    cuda = options.device == "cuda"
    faulthandler.dump_traceback_later(30, repeat=True)  # a stage that runs out of its time leaves where it was
    tokens = batch(GRIN_TINY, 4 if cuda else 1, 256 if cuda else 64)
    with session(RuntimeConfig(device=options.device)) as runtime:
        engine = build_engine(GRIN_TINY, runtime.device, "bf16" if cuda else "fp32", compiled=options.compile)
        losses = [engine.train_step([tokens], step, 1e-3).loss for step in range(options.steps)]
    print("loss " + " ".join(f"{loss:.3f}" for loss in losses[:: max(1, options.steps // 10)]))
    # A batch that is seen again and again: even a few steps must show.
    fell = losses[-1] < losses[0] - 0.1
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {options.steps} steps: {'fell' if fell else 'did NOT fall'}")
    return 0 if fell else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
