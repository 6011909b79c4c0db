"""Objectives: what a training minimises, and how the model it trains is sampled."""

from dar_jax.objectives.flow import build
from dar_jax.objectives.objective import Objective

__all__ = ["Objective", "build"]
