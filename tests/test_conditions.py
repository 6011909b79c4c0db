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


WORDS = conditions.Words(("red", "heart", "tiger"), length=3, dropout=0.25)


def test_captions_become_numbers_of_words():
    condition = WORDS.parse(["Tiger: red", "heart"])
    np.testing.assert_array_equal(condition["words"], [[4, 2, 0], [3, 0, 0]])
    np.testing.assert_array_equal(WORDS.encode({"caption": "a red, red (heart)"})["words"], [2, 2, 3])
    np.testing.assert_array_equal(WORDS.null(condition)["words"], [[1, 0, 0], [1, 0, 0]])
    many = {"words": jnp.tile(condition["words"], (5000, 1))}
    dropped = np.asarray(WORDS.drop(jax.random.key(0), many)["words"])
    is_null = (dropped == [1, 0, 0]).all(axis=1)
    assert abs(is_null.mean() - 0.25) < 0.02
    np.testing.assert_array_equal(dropped[~is_null], many["words"][~is_null])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a tigger"], r'does not know "a" of "a tigger"'),
        (["tigger"], 'Did you mean "tiger"'),
        (["red red red red"], "has 4 words; the model reads at most 3"),
        ([], "--prompts is missing"),
    ],
)
def test_prompts_that_the_model_cannot_read(names, message):
    with pytest.raises(UserError, match=message):
        WORDS.parse(names)


def test_data_without_captions_or_with_long_ones():
    class Source:
        captions = ("red heart", "red red tiger heart")

    with pytest.raises(UserError, match='text_length = 3, but the caption "red red tiger heart" has 4 words'):
        WORDS.check_data(Source)
    with pytest.raises(UserError, match="have labels and no captions"):
        WORDS.check_data(object())
