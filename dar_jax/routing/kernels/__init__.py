"""The passes over the history and to what a sublayer reads, with the same signatures for XLA, TPUs and GPUs."""
