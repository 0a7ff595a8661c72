"""Learning-rate schedules."""

import math

from megagrin.optim.optimizer import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) in a run of `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.lr * config.min_lr_ratio
    if config.schedule == "cosine":
        progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
        return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "wsd":
        decay_steps = max(1, round(config.decay_fraction * steps))
        progress = min(1.0, max(0.0, (step - (steps - decay_steps)) / decay_steps))
        return config.lr + (floor - config.lr) * progress
    return config.lr
