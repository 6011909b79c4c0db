"""Labels: which are sampled, which are dropped, and what guidance compares them with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax import conditions
from dar_jax.errors import UserError


def test_labels_to_sample():
    kind = conditions.Labels(10)
    balanced = kind.to_sample(23, "balanced", 0)["label"]
    np.testing.assert_array_equal(balanced, np.arange(23) % 10)
    labels = kind.to_sample(5000, "random", 0)["label"]
    np.testing.assert_array_equal(kind.to_sample(777, "random", 0)["label"], labels[:777])
    assert labels.dtype == balanced.dtype == np.int32 and set(labels) == set(range(10))
    assert np.bincount(labels).min() > 400 and (labels[:-1] == labels[1:]).mean() < 0.15
    assert (kind.to_sample(5000, "random", 1)["label"] != labels).mean() > 0.8


def test_dropout_gives_the_null_label_at_its_rate():
    kind = conditions.Labels(10, dropout=0.3)
    label = jnp.arange(20_000) % 10
    dropped = kind.drop(jax.random.key(0), {"label": label})["label"]
    is_null = np.asarray(dropped == 10)
    assert abs(is_null.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / len(label))
    np.testing.assert_array_equal(dropped[~is_null], label[~is_null])
    other = kind.drop(jax.random.key(1), {"label": label})["label"]
    assert abs(((other == 10) & is_null).mean() - 0.09) < 0.02  # independent of the first draw
    np.testing.assert_array_equal(conditions.Labels(10).drop(jax.random.key(0), {"label": label})["label"], label)


def test_a_sample_and_its_null_are_neighbours():
    condition = {"text": jnp.arange(6.0).reshape(3, 2), "mask": jnp.array([True, False, True])}
    null = {"text": -jnp.ones((3, 2)), "mask": jnp.zeros(3, bool)}
    both = conditions.interleave(condition, null)
    np.testing.assert_array_equal(both["text"][::2], condition["text"])
    np.testing.assert_array_equal(both["text"][1::2], null["text"])
    np.testing.assert_array_equal(both["mask"], [True, False, False, False, True, False])
    assert conditions.length(both) == 6
    np.testing.assert_array_equal(conditions.Labels(4).null({"label": jnp.arange(3)})["label"], [4, 4, 4])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1", "10"], "--labels: 10 is no class; the model has classes 0 to 9"),
        (["x"], "x is no class"),
        ([], "is empty"),
    ],
)
def test_words_that_are_no_classes(names, message):
    with pytest.raises(UserError, match=message):
        conditions.Labels(10).parse(names)
    np.testing.assert_array_equal(conditions.Labels(30).parse(None)["label"], np.arange(10))
