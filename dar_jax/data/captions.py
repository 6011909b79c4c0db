"""What captions need beside the images: a vocabulary or an encoder, and those of which an evaluation draws samples."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dar_jax import conditions
from dar_jax.conditions import Condition, Embeddings, Labels, Words, split_words
from dar_jax.data.sources import Source, open_source, suited
from dar_jax.data.texts import Texts
from dar_jax.errors import UserError, require
from dar_jax.pretrained import qwen_text


def with_captions_of(source: Source, config: ConfigDict) -> ConfigDict:
    """The config of a run on the training data `source`.

    Without config.model.words it takes those of the captions, the most frequent first, equally frequent ones by the
    alphabet. Without config.model.text_encoder it takes the encoder of the embeddings.

    Raises UserError if config.model.text_encoder is another one.
    """
    kind = conditions.build(config.model)
    if isinstance(kind, Words) and not kind.vocabulary and (captions := getattr(source, "captions", None)):
        counts = Counter()
        for caption, times in Counter(captions).items():
            for word in split_words(caption):
                counts[word] += times
        config = config.copy_and_resolve_references()
        config.model.words = tuple(sorted(counts, key=lambda word: (-counts[word], word)))
    if isinstance(kind, Embeddings) and (texts := getattr(source, "texts", None)):
        check_encoder(config, texts, "config.data.train_split")
        config = config.copy_and_resolve_references()
        config.model.text_encoder = texts.encoder
    return config


def check_encoder(config: ConfigDict, texts: Texts, name: str) -> None:
    """Raises UserError if the embeddings of the split `name` are not of the encoder of the model."""
    known = config.model.text_encoder
    require(
        known in ("", texts.encoder),
        f"the embeddings of {name} are of the text encoder {texts.encoder[:12]}, but the model learns those of "
        f"{known[:12]} (config.model.text_encoder); prepare them with the same --text_encoder.",
    )


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


def to_sample(config: ConfigDict, count: int, split: str | None = None, labels: np.ndarray | None = None) -> ToSample:
    """What samples 0, 1, ..., count - 1 are drawn of, in the order of `config.eval.labels`.

    Of a model of labels they are its classes; of captions, the examples of `split`, by default of
    `config.data.eval_split`. A longer list begins with the shorter one. With `labels`, int [count], sample i is an
    example of label i, those of a label in their order, again and again; labels without an example are left out.
    """
    kind, settings = conditions.build(config.model), config.eval
    if isinstance(kind, Labels):
        condition = kind.to_sample(count, settings.labels, config.seed)
        return ToSample(condition, None, condition["label"], {})
    split = split or config.data.eval_split
    source = suited(open_source(config.data, split), config.model.channels, kind)
    if labels is None:
        rows = conditions.ORDERS[settings.labels](count, len(source), config.seed).astype(int)
    else:
        labels = labels[np.isin(labels, source.labels)]
        of_label = {label: itertools.cycle(np.flatnonzero(source.labels == label)) for label in np.unique(labels)}
        rows = np.array([next(of_label[label]) for label in labels], int)
    if isinstance(kind, Words):
        captions = [source.captions[row] for row in rows]
        condition = _stack([kind.encode({"caption": caption}) for caption in captions])
    else:
        check_encoder(config, source.texts, f'the split "{split}"')
        examples = [source[row] for row in rows]
        captions = [example["caption"] for example in examples]
        condition = _embeddings(kind, [example["text"] for example in examples], source.texts.empty)
    attributes = getattr(source, "attributes", {})
    return ToSample(condition, captions, source.labels[rows] if attributes else np.zeros(len(rows), int), attributes)


def of_prompts(config: ConfigDict, prompts: Sequence[str]) -> Condition:
    """What samples of prompts on a command line are drawn of, by a model of captions.

    Embeddings are made by the encoder of `config.data.text_encoder`. Without it, they are those of the same captions in
    the prepared `config.data.eval_split`.

    Raises UserError if a prompt cannot be read, or there is no encoder, or another than that of the training data.
    """
    kind = conditions.build(config.model)
    if isinstance(kind, Words):
        return kind.parse(prompts)
    conditions.require_prompts(prompts)
    directory = config.data.text_encoder
    if not directory:
        source = open_source(config.data, config.data.eval_split)
        kind.check_data(source)
        check_encoder(config, source.texts, f'the split "{config.data.eval_split}"')
        return _embeddings(kind, [_prepared(source, prompt)["text"] for prompt in prompts], source.texts.empty)
    encoder = qwen_text.load(directory, "--text_encoder")
    require(
        config.model.text_encoder in ("", encoder.fingerprint),
        f'--text_encoder = "{directory}" has the fingerprint {encoder.fingerprint[:12]}, but the model has learnt the '
        f"embeddings of {config.model.text_encoder[:12]}; name the encoder that prepared its data.",
    )
    *texts, empty = encoder.encode([*prompts, qwen_text.EMPTY_PROMPT])
    for prompt, text in zip(prompts, texts, strict=True):
        require(
            len(text) <= kind.length,
            f'--prompts: "{prompt}" has {len(text)} tokens; the model reads at most {kind.length}.',
        )
    return _embeddings(kind, texts, empty)


def _prepared(source: Source, prompt: str) -> dict[str, Any]:
    """The example of the caption `prompt`."""
    if prompt not in source.captions:
        raise UserError(
            f'--prompts: "{prompt}" is no caption of config.data.eval_split, whose embeddings are prepared; name the '
            "encoder of other prompts with --text_encoder=DIR."
        )
    return source[source.captions.index(prompt)]


def _embeddings(kind: Embeddings, texts: Sequence[np.ndarray], empty: np.ndarray) -> Condition:
    length = kind.padded_length(max(map(len, [*texts, empty])))
    return _stack([kind.encode({"text": text, "empty": empty, "length": length}) for text in texts])


def _stack(each: list[Condition]) -> Condition:
    return jax.tree.map(lambda *x: np.stack(x), *each)
