"""Samples to numbers: features, streaming statistics, distances."""
