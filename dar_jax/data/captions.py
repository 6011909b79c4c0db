"""What captions need beside the images: their vocabulary, and those of which an evaluation draws samples."""

from collections import Counter
from typing import NamedTuple

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
    counts = Counter()
    for caption, times in Counter(captions).items():
        for word in split_words(caption):
            counts[word] += times
    config = config.copy_and_resolve_references()
    config.model.words = tuple(sorted(counts, key=lambda word: (-counts[word], word)))
    return config


class ToSample(NamedTuple):
    """Of what samples are drawn.

    Attributes:
      condition: of each sample, numpy arrays.
      captions: the texts of captions, else None.
      labels: of each sample, int [N], among those of the data; 0 for data without attributes.
      attributes: the values of each attribute by label, int [num_classes], which a classifier of the labels can tell;
        empty for data without attributes.
    """

    condition: Condition
    captions: list[str] | None
    labels: np.ndarray
    attributes: dict[str, np.ndarray]


def to_sample(config: ConfigDict, count: int, split: str | None = None) -> ToSample:
    """What samples 0, 1, ..., count - 1 are drawn of, in the order of `config.eval.labels`.

    Of a model of labels they are its classes; of captions, the examples of `split`, by default of
    `config.data.eval_split`. A longer list begins with the shorter one.
    """
    kind, settings = conditions.build(config.model), config.eval
    if isinstance(kind, Labels):
        condition = kind.to_sample(count, settings.labels, config.seed)
        return ToSample(condition, None, condition["label"], {})
    source = open_source(config.data, split or config.data.eval_split)
    rows = conditions.ORDERS[settings.labels](count, len(source), config.seed).astype(int)
    captions = [source.captions[row] for row in rows]
    condition = jax.tree.map(lambda *x: np.stack(x), *(kind.encode({"caption": caption}) for caption in captions))
    attributes = getattr(source, "attributes", {})
    return ToSample(condition, captions, source.labels[rows] if attributes else np.zeros(count, int), attributes)
