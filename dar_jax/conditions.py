"""What a model is conditioned on besides the time. Today that is a class label.

A condition is a tree of arrays with the samples on their leading axis: {"label": int32 [B]}. This module knows its null
value, which guidance compares with, its dropout in training, and what to sample. Everything else passes it on unread,
from the batch to the embedder of the model.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from dar_jax.errors import UserError

Condition = dict[str, Any]


class Labels(NamedTuple):
    """Class labels 0 to num_classes - 1; the null label is num_classes.

    Attributes:
      num_classes: of the model.
      dropout: probability of training on the null label.
    """

    num_classes: int
    dropout: float = 0.0

    def abstract(self, batch_size: int) -> Condition:
        """Shapes and dtypes of the conditions of a batch."""
        return {"label": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

    def null(self, condition: Condition) -> Condition:
        """The null condition for as many samples as `condition` has."""
        return {"label": jnp.full_like(condition["label"], self.num_classes)}

    def drop(self, key: Array, condition: Condition) -> Condition:
        """Replaces each sample's condition by the null condition with probability `dropout`."""
        if not self.dropout:
            return condition
        label = condition["label"]
        is_dropped = jax.random.bernoulli(key, self.dropout, label.shape)
        return {"label": jnp.where(is_dropped, self.num_classes, label)}

    def check_data(self, num_classes: int) -> None:
        """Raises UserError if data of so many classes have labels that the model does not know."""
        if num_classes > self.num_classes:
            raise UserError(
                f"config.model.num_classes = {self.num_classes} but the data has {num_classes} classes; "
                f"set it to {num_classes}."
            )

    def parse(self, names: Sequence[str] | None) -> Condition:
        """Conditions from the words of a command line; None stands for all classes, ten at most.

        Raises UserError if there is none, or one is no class.
        """
        names = [str(i) for i in range(min(self.num_classes, 10))] if names is None else names
        if not names:
            raise UserError("--labels is empty; name classes, as in --labels=0,1,2.")
        for name in names:
            if not name.isdecimal() or int(name) >= self.num_classes:
                raise UserError(f"--labels: {name} is no class; the model has classes 0 to {self.num_classes - 1}.")
        return {"label": np.asarray(names, np.int32)}

    def to_sample(self, count: int, order: str, seed: int) -> Condition:
        """Conditions of samples 0, 1, ..., count - 1, as numpy arrays; a longer list begins with the shorter one.

        Args:
          count: number of samples.
          order: one of `ORDERS`.
          seed: of random draws.
        """
        return {"label": ORDERS[order](count, self.num_classes, seed).astype(np.int32)}


def _balanced(count: int, num_classes: int, seed: int) -> np.ndarray:
    """Sample i is of class i % num_classes."""
    return np.arange(count) % num_classes


def _random(count: int, num_classes: int, seed: int) -> np.ndarray:
    """Uniform draws: doubles, one from each step of the generator, so that the list does not depend on its length."""
    return np.random.default_rng(seed).random(count) * num_classes


ORDERS = {"balanced": _balanced, "random": _random}


def build(model: ConfigDict) -> Labels:
    """The kind of condition that the model of `config.model` takes."""
    return Labels(model.num_classes, model.label_dropout)


def interleave(condition: Condition, null: Condition) -> Condition:
    """Each sample's condition followed by its null condition, `[B, ...]` twice -> `[2 B, ...]`.

    The two rows of a sample are neighbours, so that they stay on its device when the batch is sharded.
    """
    return jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:]), condition, null)


def length(condition: Condition) -> int:
    """Number of samples."""
    return len(jax.tree.leaves(condition)[0])
