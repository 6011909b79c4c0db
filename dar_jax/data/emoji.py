"""Emoji as captioned pictures: rendered from Debian's fonts-noto-color-emoji, named by the PyPI package emoji.

Captions are compositional: "woman construction worker: dark skin tone", "flag: Nepal". The test split holds out whole
combinations. Of every subject that comes in five skin tones one tone is left out of training, and of the couples in two
tones every fifth pair. So each word of a held-out caption is known, and its combination was never seen.

A label is a combination of three attributes (`ATTRIBUTES`), read off the caption, which a classifier can tell from the
picture.
"""

import functools
import re
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dar_jax.errors import UserError, check_choice

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # the only one of this font, whose glyphs are bitmaps
WIDTH, HEIGHT = 136, 128  # of a glyph
HELD_OUT = 5  # one combination in so many

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
PEOPLE = {
    "woman": {"woman", "women", "girl", "mother", "princess", "mrs.", "lady"},
    "man": {"man", "men", "boy", "father", "prince", "mr.", "santa"},
    "person": {"person", "people", "child", "children", "baby", "adult", "mx", "family", "couple"},
}
HANDS = {"hand", "hands", "fist", "finger", "fingers", "index", "thumbs", "palm", "palms", "salute", "biceps", "ear"}
# The attributes and their values; those of a caption are the first that suit it.
ATTRIBUTES = {
    "tone": ("none", *TONES, "two"),
    "person": ("none", "woman", "man", "both", "person"),
    "kind": ("flag", "face", "hand", "person", "other"),
}

_TONE = re.compile(r"(?:medium-light|medium-dark|light|medium|dark) skin tone")


def attributes(caption: str) -> tuple[int, ...]:
    """The number of the value of each attribute in `ATTRIBUTES`."""
    tones, words = _TONE.findall(caption), set(re.findall(r"[^\s:,]+", caption.lower()))
    tone = "two" if len(tones) > 1 else tones[0].removesuffix(" skin tone") if tones else "none"
    found = [who for who, names in PEOPLE.items() if words & names]
    hand = bool(words & HANDS)
    person = "both" if found[:2] == ["woman", "man"] else found[0] if found else "none"
    if person == "none" and tones and not hand:
        person = "person"
    kind = "flag" if caption.startswith("flag: ") else "face" if "face" in words and not tones else "other"
    kind = "hand" if hand and person == "none" else "person" if person != "none" else kind
    return tuple(ATTRIBUTES[name].index(value) for name, value in (("tone", tone), ("person", person), ("kind", kind)))


class EmojiSource:
    """A split: images uint8 [size, size, 3] on white, labels, and captions.

    `attributes` has for each of `ATTRIBUTES` the numbers of its values by label, int [num_classes].
    """

    def __init__(self, images: np.ndarray, captions: list[str], table: np.ndarray):
        self.images, self.captions, self.num_classes = images, captions, len(table)
        self.attributes = dict(zip(ATTRIBUTES, table.T, strict=True))
        label = {tuple(row): i for i, row in enumerate(table.tolist())}
        self.labels = np.array([label[attributes(caption)] for caption in captions], np.int32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": int(self.labels[index]), "caption": self.captions[index]}

    def image_size(self, index: int) -> tuple[int, int]:
        return self.images.shape[1:3]


def open_emoji(split: str, size: int) -> EmojiSource:
    """The split "train" or "test", rendered at `size` x `size` pixels.

    Raises UserError if the split is another, or the font or the package is missing.
    """
    check_choice("split of emoji", split, ("train", "test"))
    images, captions = render(size)
    held_out = held_out_captions(captions)
    chosen = [i for i, caption in enumerate(captions) if (caption in held_out) == (split == "test")]
    table = np.unique([attributes(caption) for caption in captions], axis=0)
    return EmojiSource(images[chosen], [captions[i] for i in chosen], table)


def held_out_captions(captions: list[str]) -> set[str]:
    """The captions of the test split: see the head of this module."""
    subjects: dict[str, list[str]] = {}
    for caption in captions:
        if _TONE.search(caption):
            subjects.setdefault(_TONE.sub("", caption).strip(" :,"), []).append(caption)
    found = set()
    for subject, members in subjects.items():
        start = zlib.crc32(subject.encode()) % HELD_OUT
        found |= set(sorted(members)[start::HELD_OUT])
    return found


@functools.lru_cache(maxsize=2)
def render(size: int) -> tuple[np.ndarray, list[str]]:
    """All emoji that the font has as one glyph, once each: uint8 [N, size, size, 3] on white, and captions.

    Raises UserError if the font or the package is missing.
    """
    if not Path(FONT).is_file():
        raise UserError(
            f'config.data.source = emoji needs the font "{FONT}"; install it: apt-get install fonts-noto-color-emoji.'
        )
    try:
        import emoji
    except ImportError as error:
        raise UserError(
            "config.data.source = emoji needs the package emoji; install it with pip install emoji."
        ) from error
    font, images, captions, seen = ImageFont.truetype(FONT, FONT_SIZE), [], [], set()
    for text, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != emoji.STATUS["fully_qualified"] or font.getbbox(text)[2] > WIDTH:
            continue
        glyph = Image.new("RGBA", (WIDTH, HEIGHT), (255, 255, 255, 0))
        ImageDraw.Draw(glyph).text((0, 0), text, font=font, embedded_color=True)
        pixels = glyph.tobytes()
        if pixels in seen or not glyph.getchannel("A").getbbox():
            continue
        seen.add(pixels)
        square = Image.new("RGB", (WIDTH, WIDTH), (255, 255, 255))
        square.paste(glyph, (0, (WIDTH - HEIGHT) // 2), glyph)
        images.append(np.asarray(square.resize((size, size), Image.Resampling.LANCZOS)))
        captions.append(caption_of(text, entry["en"]))
    return np.stack(images), captions


def caption_of(text: str, name: str) -> str:
    """The caption of an emoji and its name: ":woman_cook_dark_skin_tone:" -> "woman cook: dark skin tone"."""
    caption = name.strip(":").replace("_", " ")
    if all(0x1F1E6 <= ord(letter) <= 0x1F1FF for letter in text):
        return f"flag: {caption}"
    tones = _TONE.findall(caption)
    return f"{_TONE.sub('', caption).strip()}: {', '.join(tones)}" if tones else caption
