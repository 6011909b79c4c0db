"""Emoji: what is rendered, what is held out, and the attributes of captions."""

import re
from pathlib import Path

import numpy as np
import pytest

from dar_jax.config import default
from dar_jax.data import emoji
from dar_jax.data.captions import to_sample
from dar_jax.data.sources import open_source
from dar_jax.errors import UserError

has_font = pytest.mark.skipif(not Path(emoji.FONT).is_file(), reason="needs apt-get install fonts-noto-color-emoji")


def split_of(name):
    data = default().data
    data.update(source="emoji", image_size=32)
    return open_source(data, name)


@has_font
def test_held_out_combinations_are_new_and_their_words_are_not():
    train, test = split_of("train"), split_of("test")
    assert len(train) + len(test) == len({*train.captions, *test.captions}) > 3700
    assert len(test) > 350
    words = {word for caption in train.captions for word in re.findall(r"[^\s:,]+", caption.lower())}
    subjects = {caption.split(": ")[0] for caption in train.captions if "skin tone" in caption}
    for caption in test.captions:
        subject, tone = caption.split(": ")
        assert set(re.findall(r"[^\s:,]+", caption.lower())) <= words
        assert subject in subjects and any(tone in other for other in train.captions)
    images = np.concatenate([train.images, test.images])
    assert images.shape[1:] == (32, 32, 3) and images.dtype == np.uint8
    # Japan's flag is white with a red disc, and a dark hand is darker than a light one.
    japan = train.images[train.captions.index("flag: Japan")]
    assert (japan[16, 16] > 150).tolist() == [True, False, False]
    every = dict(zip(train.captions + test.captions, images, strict=True))
    assert every["raised fist: dark skin tone"].mean() < every["raised fist: light skin tone"].mean() - 20


@pytest.mark.parametrize(
    ("caption", "tone", "person", "kind"),
    [
        ("woman cook: medium-dark skin tone", "medium-dark", "woman", "person"),
        ("thumbs up: light skin tone", "light", "none", "hand"),
        ("people holding hands: dark skin tone, light skin tone", "two", "person", "person"),
        ("artist: medium skin tone", "medium", "person", "person"),
        ("woman and man holding hands: dark skin tone", "dark", "both", "person"),
        ("grinning face", "none", "none", "face"),
        ("flag: Norway", "none", "none", "flag"),
        ("red apple", "none", "none", "other"),
    ],
)
def test_attributes_of_captions(caption, tone, person, kind):
    found = emoji.attributes(caption)
    assert [values[i] for values, i in zip(emoji.ATTRIBUTES.values(), found, strict=True)] == [tone, person, kind]


def test_captions_of_names():
    assert emoji.caption_of("\U0001f1f3\U0001f1f5", ":Nepal:") == "flag: Nepal"
    assert emoji.caption_of("x", ":woman_cook_medium-dark_skin_tone:") == "woman cook: medium-dark skin tone"
    couple = ":kiss_man_man_dark_skin_tone_light_skin_tone:"
    assert emoji.caption_of("x", couple) == "kiss man man: dark skin tone, light skin tone"


def test_a_missing_font_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(emoji, "FONT", "/nowhere/font.ttf")
    emoji.render.cache_clear()
    with pytest.raises(UserError, match="apt-get install fonts-noto-color-emoji"):
        split_of("train")
    with pytest.raises(UserError, match="split of emoji"):
        split_of("valid")


@has_font
def test_captions_to_sample_are_matched_by_their_labels():
    config = default()
    config.data.update(source="emoji", image_size=32)
    config.model.update(family="mmdit", words=("skin", "tone"))
    held_out = to_sample(config, 400)
    seen = to_sample(config, 400, "train", held_out.labels)
    np.testing.assert_array_equal(seen.labels, held_out.labels)
    assert not set(seen.captions) & set(held_out.captions) and len(set(seen.captions)) > 300
    assert seen.condition["words"].shape == (400, 16)
