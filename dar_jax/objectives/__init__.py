"""Objectives: what a training minimises, and how the model it trains is sampled."""

from dar_jax.objectives.build import build
from dar_jax.objectives.objective import HiddenTerm, Objective

__all__ = ["HiddenTerm", "Objective", "build"]
