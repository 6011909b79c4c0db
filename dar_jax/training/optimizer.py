"""AdamW with the schedules of `config.optimizer`."""

import optax
from ml_collections import ConfigDict


def make_schedule(optimizer: ConfigDict, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then constant or a cosine to 0 at `num_steps`."""
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    if optimizer.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, max(num_steps, warmup + 1))
    return optax.warmup_constant_schedule(0.0 if warmup else peak, peak, warmup)


def make_optimizer(optimizer: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """AdamW (float32 state), after clipping by the global norm where `clip_norm` > 0."""
    adamw = optax.adamw(
        make_schedule(optimizer, num_steps), b1=optimizer.b1, b2=optimizer.b2, weight_decay=optimizer.weight_decay
    )
    clip = optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    return optax.chain(clip, adamw)
