"""What a model is conditioned on besides the time: a class label, the words of a caption, or its embeddings.

A condition is a tree of arrays with the samples on their leading axis: {"label": int32 [B]}, {"words": int32 [B, L]},
or {"text": float32 [B, L, E], "mask": bool [B, L], "empty": float32 [B, M, E]}.
A kind of condition knows how to make one of an example of the data, its null value, which guidance compares with, its
dropout in training, and what a command line means. Everything else passes a condition on unread, from the batch to the
embedder of the model.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from dar_jax.errors import UserError, near_miss

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

    def check_data(self, source: Any) -> None:
        """Raises UserError if the data (`data.sources.Source`) have labels that the model does not know."""
        if source.num_classes > self.num_classes:
            raise UserError(
                f"config.model.num_classes = {self.num_classes} but the data has {source.num_classes} classes; "
                f"set it to {source.num_classes}."
            )

    def encode(self, example: dict[str, Any]) -> Condition:
        """The condition of one example of the data, {"label": int32 []}."""
        return {"label": np.int32(example["label"])}

    def parse(self, names: Sequence[str] | None) -> Condition:
        """Conditions from the names on a command line; None stands for all classes, ten at most.

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

PADDING, EMPTY = 0, 1  # the first two numbers of words: none, and the one word of the empty caption
_WORD = re.compile(r"[^\s:,;()]+")


def split_words(caption: str) -> list[str]:
    """The words of a caption in lower case, "Woman cook: dark skin tone" -> woman, cook, dark, skin, tone."""
    return _WORD.findall(caption.lower())


def require_prompts(prompts: Sequence[str] | None) -> None:
    """Raises UserError if there are none on the command line."""
    if not prompts:
        raise UserError('--prompts is missing; give captions, as in --prompts="red heart;tiger face".')


class Words(NamedTuple):
    """Captions as numbers of known words, {"words": int32 [B, length]}; zeros follow the last word.

    The null caption is the empty one.

    Attributes:
      vocabulary: the known words, in lower case. The first has the number 2.
      length: words of a caption, at most.
      dropout: probability of training on the empty caption.
    """

    vocabulary: tuple[str, ...]
    length: int
    dropout: float = 0.0

    def abstract(self, batch_size: int) -> Condition:
        """Shapes and dtypes of the conditions of a batch."""
        return {"words": jax.ShapeDtypeStruct((batch_size, self.length), jnp.int32)}

    def null(self, condition: Condition) -> Condition:
        """The empty caption for as many samples as `condition` has."""
        return {"words": jnp.full_like(condition["words"], PADDING).at[:, 0].set(EMPTY)}

    def drop(self, key: Array, condition: Condition) -> Condition:
        """Replaces each sample's caption by the empty one with probability `dropout`."""
        if not self.dropout:
            return condition
        words = condition["words"]
        is_dropped = jax.random.bernoulli(key, self.dropout, (len(words), 1))
        return {"words": jnp.where(is_dropped, self.null(condition)["words"], words)}

    def check_data(self, source: Any) -> None:
        """Raises UserError if the data (`data.sources.Source`) have no captions, or a caption is too long."""
        captions = getattr(source, "captions", None)
        if captions is None:
            raise UserError(
                "config.model.text = words, but the examples of config.data.source have labels and no captions; take "
                "emoji, captions or captioned tfds, or set config.model.family = sit."
            )
        longest = max(dict.fromkeys(captions), key=lambda caption: len(split_words(caption)))
        if (count := len(split_words(longest))) > self.length:
            raise UserError(
                f'config.model.text_length = {self.length}, but the caption "{longest}" has {count} words; set it to '
                f"{count}."
            )

    def encode(self, example: dict[str, Any]) -> Condition:
        """The caption of one example of the data, {"words": int32 [length]}; unknown words are left out."""
        known = _numbers(self.vocabulary)
        return {"words": self._padded([known[word] for word in split_words(example["caption"]) if word in known])}

    def parse(self, names: Sequence[str] | None) -> Condition:
        """Conditions from the captions on a command line.

        Raises UserError if there is none, one is too long, or has an unknown word.
        """
        require_prompts(names)
        known, rows = _numbers(self.vocabulary), []
        for name in names:
            words = split_words(name)
            for word in words:
                if word not in known:
                    raise UserError(
                        f'--prompts: the model does not know "{word}" of "{name}"; it knows {len(known)} words.'
                        f"{near_miss(word, known)}"
                    )
            if len(words) > self.length:
                raise UserError(f'--prompts: "{name}" has {len(words)} words; the model reads at most {self.length}.')
            rows.append(self._padded([known[word] for word in words]))
        return {"words": np.stack(rows)}

    def _padded(self, numbers: list[int]) -> np.ndarray:
        numbers = (numbers or [EMPTY])[: self.length]
        return np.array(numbers + [PADDING] * (self.length - len(numbers)), np.int32)


@functools.lru_cache(maxsize=4)
def _numbers(vocabulary: tuple[str, ...]) -> dict[str, int]:
    return {word: number for number, word in enumerate(vocabulary, start=EMPTY + 1)}


EMPTY_TOKENS = 6  # of the empty prompt " " in the template of Qwen-Image: itself, and the five that follow a prompt


class Embeddings(NamedTuple):
    """Captions as the hidden states that a frozen encoder made of them.

    A condition is {"text": float32 [B, L, size], "mask": bool [B, L], "empty": float32 [B, M, size]}. The mask says
    which tokens are no padding, which is zeros on the right. L is one of `lengths`. "empty" is the embedding of the
    empty prompt, the null, all M tokens of it: it comes with the data, as the texts do, so that nothing else has to be
    read.

    Attributes:
      size: of the hidden states of a token.
      length: tokens of a text, at most.
      dropout: probability of training on the empty prompt.
    """

    size: int
    length: int
    dropout: float = 0.0

    @property
    def lengths(self) -> tuple[int, ...]:
        """The few numbers of tokens, ascending, to which the texts of a batch are padded: for each a step compiles."""
        return tuple(sorted({self.length // part for part in (8, 4, 2, 1)} - {0}))

    def padded_length(self, longest: int) -> int:
        """The smallest of `lengths` that holds `longest` tokens; the largest if none does."""
        return next((length for length in self.lengths if longest <= length), self.length)

    def abstract(self, batch_size: int) -> Condition:
        """Shapes and dtypes of the conditions of a batch with a text of `length` tokens."""
        shapes = {"text": self.length, "empty": min(EMPTY_TOKENS, self.length)}
        found = {name: jax.ShapeDtypeStruct((batch_size, n, self.size), jnp.float32) for name, n in shapes.items()}
        return {**found, "mask": jax.ShapeDtypeStruct((batch_size, self.length), jnp.bool)}

    def null(self, condition: Condition) -> Condition:
        """The empty prompt for as many samples as `condition` has, padded as its texts are."""
        empty, length = condition["empty"], condition["text"].shape[1]
        text = jnp.pad(empty, ((0, 0), (0, length - empty.shape[1]), (0, 0)))
        mask = jnp.broadcast_to(jnp.arange(length) < empty.shape[1], condition["mask"].shape)
        return {"text": text, "mask": mask, "empty": empty}

    def drop(self, key: Array, condition: Condition) -> Condition:
        """Replaces each sample's text by the empty prompt with probability `dropout`."""
        if not self.dropout:
            return condition
        is_dropped = jax.random.bernoulli(key, self.dropout, (len(condition["mask"]), 1))
        null = self.null(condition)
        text = jnp.where(is_dropped[..., None], null["text"], condition["text"])
        return {**condition, "text": text, "mask": jnp.where(is_dropped, null["mask"], condition["mask"])}

    def check_data(self, source: Any) -> None:
        """Raises UserError if the data (`data.sources.Source`) have no embeddings, or others than the model reads."""
        texts = getattr(source, "texts", None)
        if texts is None:
            raise UserError(
                "config.model.text = embeddings, but the examples of config.data.source have none; prepare them with "
                "python -m dar_jax.prepare --text_encoder=DIR and set config.data.source = latents."
            )
        if texts.size not in (None, self.size):
            raise UserError(
                f"config.model.text_size = {self.size}, but the embeddings of the data have {texts.size} features; set "
                f"it to {texts.size}."
            )
        if (longest := texts.longest()) > self.length:
            raise UserError(
                f"config.model.text_length = {self.length}, but the longest text of the data has {longest} tokens; set "
                f"it to {longest}."
            )

    def encode(self, example: dict[str, Any]) -> Condition:
        """The condition of one example, {"text": [n, size], "empty": [M, size], "length": L >= n and M}, as above."""
        text, empty, length = example["text"], example["empty"], example["length"]
        padded = np.zeros((length, self.size), np.float32)
        padded[: len(text)] = text
        return {"text": padded, "mask": np.arange(length) < len(text), "empty": empty.astype(np.float32)}


Kind = Labels | Words | Embeddings


def build(model: ConfigDict) -> Kind:
    """The kind of condition that the model of `config.model` takes."""
    if model.family == "sit":
        return Labels(model.num_classes, model.label_dropout)
    if model.text == "embeddings":
        return Embeddings(model.text_size, model.text_length, model.label_dropout)
    return Words(tuple(model.words), model.text_length, model.label_dropout)


def interleave(condition: Condition, null: Condition) -> Condition:
    """Each sample's condition followed by its null condition, `[B, ...]` twice -> `[2 B, ...]`.

    The two rows of a sample are neighbours, so that they stay on its device when the batch is sharded.
    """
    return jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:]), condition, null)


def length(condition: Condition) -> int:
    """Number of samples."""
    return len(jax.tree.leaves(condition)[0])
