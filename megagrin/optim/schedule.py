"""Learning-rate schedules."""

import math

from megagrin.optim.optimizer import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of an optimizer step, without a jump anywhere.

    Warm-up is linear and reaches the peak `config.lr` with its last step (without warm-up: with the first step of the run). What
    decays starts there, or later, and reaches `config.lr * config.min_lr_ratio` with the last step of the run. A run that ends
    with its warm-up ends at the peak.

    Schedulers of torch, transformers and Megatron-Core have the same curve one step later: their first step has rate 0, and
    their last one lies just above the final rate.

    Args:
        config: peak, floor and shape.
        step: optimizer step, from 0.
        steps: of the whole run; steps after the last one have its rate.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    peak, last = max(config.warmup_steps - 1, 0), steps - 1
    if config.schedule == "constant":
        return config.lr
    start = peak
    if config.schedule == "wsd":
        # A decay that would begin within the warm-up begins at its end.
        start = max(peak, last - math.ceil(config.decay_fraction * steps - 1e-9))
    if step <= start:
        return config.lr
    progress = min(1.0, (step - start) / max(1, last - start))
    if config.schedule == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return config.lr * ((1 - progress) + progress * config.min_lr_ratio)
