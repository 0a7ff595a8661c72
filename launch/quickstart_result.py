"""Say what the quickstart came to, and fail when it did not learn (or when the control did)."""

import argparse
import math
import sys
from pathlib import Path

from megagrin.observe.metrics import read_metrics

REQUIRED_FALL = 0.5


def main() -> int:
    """Compare the last validation loss with the first; the control must stay above half of its first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--control", choices=["true", "false"], default="false")
    options = parser.parse_args()
    rows = read_metrics(options.run / "metrics.jsonl")
    valid = [(row["step"], row["valid_loss"]) for row in rows if "valid_loss" in row]
    train = [row for row in rows if "loss" in row]
    first, last = valid[0][1], valid[-1][1]
    fall = 1 - last / first
    speed = sorted(row["tokens_per_second"] for row in train)[len(train) // 2]
    worst = max(max(row["load_max"]) for row in train[-20:])
    experts = len(train[-1]["load"][0])
    print(f"validation loss   {first:.3f} before training -> {last:.3f} after step {valid[-1][0]} ({100 * fall:.1f} % lower)")
    print(f"perplexity        {math.exp(first):.0f} -> {math.exp(last):.1f}")
    print(f"median speed      {speed:,.0f} tokens/s; largest expert load {worst:.3f} (balanced {1 / experts:.4f})")
    for picture in sorted((options.run / "plots").glob("*.png")):
        print(f"picture           {picture}")
    if options.control == "true":
        learned = fall >= REQUIRED_FALL
        print(f"control           {'FAILED: random labels were learned' if learned else 'ok: nothing to learn, nothing learned'}")
        return int(learned)
    if fall < REQUIRED_FALL:
        print(
            f"megagrin: error: the validation loss fell by {100 * fall:.1f} %, expected {100 * REQUIRED_FALL:.0f} %",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
