"""Embeddings of captions: prepared, read back, put in batches, dropped, and what is sampled of them."""

import json

import jax
import numpy as np
import pytest

from dar_jax import conditions
from dar_jax.data import prepare
from dar_jax.data.captions import check_encoder, of_prompts, to_sample, with_captions_of
from dar_jax.data.pipeline import train_iterator
from dar_jax.data.sources import open_source
from dar_jax.errors import UserError
from dar_jax.pretrained.qwen_text import EMPTY_PROMPT
from tests.data.prepared import shards, tiny_vae
from tests.data.test_caption_folder import captions_config, write_captions

CAPTIONS = ["red", "a red heart", "größe", "tiger, tiger", "x", "a bicycle on the moon"]


class FakeEncoder:
    """One token for each letter, and two more; what a token gets follows from its letter and place alone."""

    size, fingerprint = 4, "f" * 64

    def __init__(self):
        self.calls = 0

    def encode(self, prompts):
        self.calls += len(prompts)
        return [np.array([[ord(c), i, 0.5, -i] for i, c in enumerate(prompt + "()")], np.float32) for prompt in prompts]


def prepare_captions(root, out, encoder, *, vae=None, shard=4, split="train", buckets=()):
    source = open_source(captions_config(root).data, split)
    settings = prepare.describe(source, f"captions:{root}", split, 8, vae, "float16", False, shard, encoder, buckets)
    prepare.prepare(
        source, settings, vae, str(out), max_skipped=1, worker=0, workers=1, say=lambda _: None, text_encoder=encoder
    )


def latents_config(root):
    config = captions_config(root)
    config.data.update(source="latents", image_size=8)
    config.model.update(text="embeddings", text_size=4, text_length=24, label_dropout=0.5, input_size=8, channels=3)
    return config


@pytest.fixture
def prepared(tmp_path):
    write_captions(tmp_path / "images", CAPTIONS)
    prepare_captions(tmp_path / "images", tmp_path / "data" / "train", FakeEncoder())
    prepare_captions(tmp_path / "images", tmp_path / "data" / "test", FakeEncoder())
    return tmp_path / "data"


def test_records_hold_texts_of_their_true_lengths(prepared, tmp_path):
    source = open_source(latents_config(prepared).data, "train")
    assert source.captions == CAPTIONS and source.texts.size == 4 and source.texts.encoder == "f" * 64
    assert source.texts.lengths.tolist() == [len(caption) + 2 for caption in CAPTIONS]
    np.testing.assert_array_equal(source.texts.empty, FakeEncoder().encode([EMPTY_PROMPT])[0])
    for i, caption in enumerate(CAPTIONS):
        example = source[i]
        np.testing.assert_array_equal(example["text"], FakeEncoder().encode([caption])[0])
        assert example["text"].dtype == np.float16 and (example["image"] == 10 + i).all()
        assert (example["caption"], example["label"]) == (caption, 0)
    prepare.verify(prepared / "train")


def test_a_stop_costs_nothing_and_another_encoder_is_noticed(prepared, tmp_path):
    done, encoder = shards(prepared / "train"), FakeEncoder()
    (prepared / "train" / "manifest.json").unlink()
    (prepared / "train" / "shard-00001-of-00002.array_record").unlink()
    prepare_captions(tmp_path / "images", prepared / "train", encoder)
    assert shards(prepared / "train") == done
    assert encoder.calls == 3  # two captions of the second shard, and the empty prompt
    encoder.fingerprint = "0" * 64
    with pytest.raises(UserError, match=r"holds data with text = .*ffff.*not .*0000.*; take another"):
        prepare_captions(tmp_path / "images", prepared / "train", encoder)
    with pytest.raises(UserError, match=r"holds data with fields = .*tokens"):
        prepare_captions(tmp_path / "images", prepared / "train", None)
    encoder.encode = lambda prompts: [np.full((2, 4), 1e5, np.float32) for _ in prompts]
    with pytest.raises(UserError, match="no numbers of float16; if that is float16, set --dtype=float32"):
        prepare_captions(tmp_path / "images", tmp_path / "new", encoder)


def test_captions_of_latents_without_an_encoder(tmp_path):
    write_captions(tmp_path / "images", CAPTIONS)
    prepare_captions(tmp_path / "images", tmp_path / "data" / "train", None, vae=tiny_vae())
    config = captions_config(tmp_path / "data")
    config.data.update(source="latents", image_size=4)
    source = open_source(config.data, "train")
    assert source.captions == CAPTIONS and source.texts is None and "text" not in source[0]
    assert "tiger" in with_captions_of(source, config).model.words


def test_batches_are_padded_to_few_lengths(prepared):
    config = latents_config(prepared)
    kind, lengths = conditions.build(config.model), set()
    assert kind.lengths == (3, 6, 12, 24)
    options = {"space": "pixels", "channels": 3, "batch_size": 2, "seed": 0, "kind": kind}
    whole = train_iterator(config.data, **options)
    half = train_iterator(config.data, **options, rows=np.array([1]))
    for _ in range(12):
        batch, part = next(whole), next(half)
        text, mask, empty = (batch["condition"][name] for name in ("text", "mask", "empty"))
        assert text.shape == (2, mask.shape[1], 4) and text.dtype == np.float32 and empty.shape == (2, 3, 4)
        longest = 0
        for i, row in enumerate((batch["x1"][:, 0, 0, 0] + 1) * 127.5 - 10):
            (expected,) = FakeEncoder().encode([CAPTIONS[round(float(row))]])
            np.testing.assert_array_equal(text[i], np.pad(expected, ((0, len(text[i]) - len(expected)), (0, 0))))
            np.testing.assert_array_equal(mask[i], np.arange(len(text[i])) < len(expected))
            longest = max(longest, len(expected))
        assert mask.shape[1] == next(n for n in kind.lengths if n >= longest)
        lengths.add(mask.shape[1])
        # A process that reads the second row alone pads it as the first process does.
        np.testing.assert_array_equal(part["condition"]["text"], text[1:])
    assert len(lengths) > 1


def test_dropped_texts_are_the_empty_prompt(prepared):
    config = latents_config(prepared)
    kind = conditions.build(config.model)
    wanted = to_sample(config, 400)
    assert wanted.captions[:6] == CAPTIONS and wanted.condition["text"].shape == (400, 24, 4)
    null, (empty,) = kind.null(wanted.condition), FakeEncoder().encode([EMPTY_PROMPT])
    np.testing.assert_array_equal(null["text"][7], np.pad(empty, ((0, 21), (0, 0))))
    np.testing.assert_array_equal(null["mask"][7], np.arange(24) < 3)
    dropped = kind.drop(jax.random.key(0), wanted.condition)
    is_null = np.asarray(dropped["text"] == null["text"]).all((1, 2))
    assert abs(is_null.mean() - 0.5) < 0.1
    for name in ("text", "mask"):
        np.testing.assert_array_equal(dropped[name][is_null], null[name][is_null])
        np.testing.assert_array_equal(dropped[name][~is_null], wanted.condition[name][~is_null])
    # As in a batch of the data, as without files.
    for other in (kind.abstract(400), jax.eval_shape(lambda: conditions.interleave(dropped, null))):
        assert jax.tree.structure(other) == jax.tree.structure(null)


def test_prompts_of_the_prepared_split_or_of_an_encoder(prepared, monkeypatch):
    config = with_captions_of(open_source(latents_config(prepared).data, "train"), latents_config(prepared))
    assert config.model.text_encoder == "f" * 64
    found = of_prompts(config, ["x", "größe"])
    assert found["mask"].sum(1).tolist() == [3, 7] and found["text"].shape == (2, 12, 4)
    with pytest.raises(UserError, match=r'"a whale" is no caption of config.data.eval_split.*--text_encoder=DIR'):
        of_prompts(config, ["x", "a whale"])
    with pytest.raises(UserError, match="--prompts is missing"):
        of_prompts(config, [])
    encoder = FakeEncoder()
    monkeypatch.setattr("dar_jax.pretrained.qwen_text.load", lambda *_: encoder)
    config.data.text_encoder = "anywhere"
    np.testing.assert_array_equal(of_prompts(config, ["x", "größe"])["text"], found["text"])
    with pytest.raises(UserError, match=r"has 32 tokens; the model reads at most 24"):
        of_prompts(config, ["a" * 30])
    encoder.fingerprint = "0" * 64
    with pytest.raises(UserError, match=r"has the fingerprint 000000000000, but the model has learnt .* ffffffffffff"):
        of_prompts(config, ["x"])


def test_data_that_the_model_does_not_read(prepared, tmp_path):
    config = latents_config(prepared)
    source = open_source(config.data, "train")
    for fields, message in (
        ({"text_size": 5}, "text_size = 5, but the embeddings of the data have 4 features; set it to 4"),
        ({"text_length": 22}, "text_length = 22, but the longest text of the data has 23 tokens; set it to 23"),
    ):
        config = latents_config(prepared)
        config.model.update(fields)
        with pytest.raises(UserError, match=message):
            conditions.build(config.model).check_data(source)
    with pytest.raises(UserError, match=r"examples of config\.data\.source have none; prepare them .*--text_encoder"):
        conditions.build(config.model).check_data(open_source(captions_config(tmp_path / "images").data, "train"))
    config.model.text_encoder = "0" * 64
    with pytest.raises(UserError, match="are of the text encoder ffffffffffff, but the model learns those of 0000"):
        check_encoder(config, source.texts, "config.data.eval_split")


def test_synthetic_texts_need_no_files():
    config = latents_config("")
    config.data.update(source="synthetic")
    config.model.update(space="latents", channels=16, text_size=5)
    kind, source = conditions.build(config.model), open_source(config.data, "train")
    kind.check_data(source)
    batch = next(train_iterator(config.data, space="latents", channels=16, batch_size=8, seed=0, kind=kind))
    assert batch["x1"].shape == (8, 8, 8, 16)
    assert len(set(batch["condition"]["mask"].sum(1).tolist())) > 2  # texts of unlike lengths
    assert jax.tree.map(np.shape, batch["condition"]) == jax.tree.map(np.shape, kind.abstract(8))
    assert to_sample(config, 3).condition["text"].shape[::2] == (3, 5)
    config.model.text = "words"
    config = with_captions_of(source, config)
    kind = conditions.build(config.model)
    kind.check_data(source)
    batch = next(train_iterator(config.data, space="latents", channels=16, batch_size=8, seed=0, kind=kind))
    assert batch["condition"]["words"].shape == (8, 24) and (batch["condition"]["words"][:, 0] > 1).all()


def test_a_damaged_manifest_is_named(prepared):
    path = prepared / "train" / "manifest.json"
    manifest = json.loads(path.read_text())
    for change in (
        {"empty": "?"},
        {"text": {"encoder": "f"}},
        {"shards": [{**s, "tokens": [3]} for s in manifest["shards"]]},
    ):
        content = {key: value for key, value in {**manifest, **change}.items() if key != "crc32"}
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"manifest\.json. cannot be read"):
            open_source(latents_config(prepared).data, "train")
