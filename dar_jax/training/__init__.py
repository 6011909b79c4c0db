"""State, step, loop, checkpoints and logs of a training run."""
