"""The three passes over the history, with the same signatures for XLA, TPUs and GPUs."""
