"""Bytes to batches: sources of images, transforms, and deterministic, resumable grain pipelines."""
