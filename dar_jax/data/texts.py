"""What a source says of the embeddings of its captions before one of them is read."""

from typing import NamedTuple

import numpy as np


class Texts(NamedTuple):
    """The embeddings of a source's captions.

    Attributes:
      encoder: the fingerprint of what made them (`pretrained.qwen_text`); "" if nothing did.
      size: features of a token; None: any, as random ones have.
      lengths: tokens of each example, int [N].
      empty: the embedding of the empty prompt, [M, size].
    """

    encoder: str
    size: int | None
    lengths: np.ndarray
    empty: np.ndarray

    def longest(self, indices: np.ndarray | slice = slice(None)) -> int:
        """Tokens of the longest text of these examples, all by default. The empty prompt counts as one of them."""
        return max(int(self.lengths[indices].max(initial=0)), len(self.empty))


NO_TEXTS = Texts("", None, np.zeros(0, int), np.zeros((0, 0), np.float32))  # synthetic ones, before they are made
