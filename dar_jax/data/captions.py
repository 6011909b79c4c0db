"""What captions need beside the images: their vocabulary, and those of which an evaluation draws samples."""

from collections import Counter

import jax
import numpy as np
from ml_collections import ConfigDict

from dar_jax import conditions
from dar_jax.conditions import Condition, Labels, split_words
from dar_jax.data.sources import Source, open_source


def with_words(config: ConfigDict, source: Source) -> ConfigDict:
    """The config of a run on the training data `source`: without config.model.words it takes those of the captions.

    The most frequent come first, equally frequent ones by the alphabet.
    """
    captions = getattr(source, "captions", None)
    if config.model.family == "sit" or config.model.words or captions is None:
        return config
    counts = Counter(word for caption in captions for word in split_words(caption))
    config = config.copy_and_resolve_references()
    config.model.words = tuple(sorted(counts, key=lambda word: (-counts[word], word)))
    return config


def to_sample(config: ConfigDict, count: int, split: str | None = None) -> Condition:
    """Conditions of samples 0, 1, ..., count - 1, numpy arrays, in the order of `config.eval.labels`.

    Of a model of labels they are its classes; of captions, the examples of `split`, by default of
    `config.data.eval_split`. A longer list begins with the shorter one.
    """
    kind, settings = conditions.build(config.model), config.eval
    if isinstance(kind, Labels):
        return kind.to_sample(count, settings.labels, config.seed)
    source = open_source(config.data, split or config.data.eval_split)
    rows = conditions.ORDERS[settings.labels](count, len(source), config.seed).astype(int)
    encoded = {row: kind.encode({"caption": source.captions[row]}) for row in np.unique(rows)}
    return jax.tree.map(lambda *x: np.stack(x), *(encoded[row] for row in rows))
