"""Whether samples show what their captions ask for, by the classifier behind fd_convnet."""

import numpy as np


def attribute_accuracy(logits: np.ndarray, labels: np.ndarray, attributes: dict[str, np.ndarray]) -> dict[str, float]:
    """The share of images in which the classifier sees the value of each attribute that was asked for.

    Args:
      logits: of the images, float32 [N, num_classes].
      labels: asked for, int [N].
      attributes: the values of each attribute by label, int [num_classes].

    Returns:
      {"accuracy/<attribute>": share}.
    """
    seen = logits.argmax(axis=-1)
    return {f"accuracy/{name}": float(np.mean(of[seen] == of[labels])) for name, of in attributes.items()}
