"""Diffusion-Adaptive Routing for any transformer: sources, queries and the softmax over depth. Knows arrays only."""
