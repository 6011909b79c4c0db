"""A file that is damaged, or cannot be written, is one line that names it, and nothing waits for a pipe."""

import json
import math
import os

import pytest

from dar_jax import files
from dar_jax.checkpoint import Checkpoints, claim_workdir, load_config
from dar_jax.data.latents import read_manifest
from dar_jax.errors import UserError
from dar_jax.pretrained.vae import read_header
from tests.data.prepared import prepare_folder, write_folder
from tests.training import tiny

MANIFEST = {"schema": 1, "num_classes": 3, "num_source": 0, "num_examples": 0, "skipped": [], "fields": [], "vae": None}
VAE = {"channels": [32], "latent_channels": 4, "scale": 0.18215, "fingerprint": "f"}


def prepare_again(folder):
    write_folder(folder / "images", 3)
    prepare_folder(folder / "images", folder)


READERS = {
    "config.json": lambda folder: load_config(str(folder)),
    "best.json": lambda folder: Checkpoints(str(folder), 2),
    "vae.json": lambda folder: read_header(str(folder), "--vae"),
    "manifest.json": read_manifest,
    "progress/settings.json": prepare_again,
}
DAMAGE = {
    "empty": lambda path: path.write_text(""),
    "cut short": lambda path: path.write_text('{"step": 1, "met'),
    "no text": lambda path: path.write_bytes(bytes(range(128, 256))),
    "a list": lambda path: path.write_text("[1, 2]"),
    "a word": lambda path: path.write_text('"x"'),
    "nested too deep": lambda path: path.write_text("[" * 100_000),
    "a directory": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", READERS)
def test_damaged_json_is_one_line(name, damage, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    DAMAGE[damage](path)
    with pytest.raises(UserError, match=path.name) as error:
        READERS[name](tmp_path)
    assert "\n" not in str(error.value)


def test_one_flipped_bit_never_changes_what_is_read(tmp_path):
    path, content = tmp_path / "x.json", {"step": 4, "value": 0.25, "names": ["a", None], "worst": math.inf}
    files.write_json(path, files.seal(content))
    assert files.read_json(path, {"step": int}, "") == content
    written, refused = path.read_bytes(), 0
    for bit in range(8 * len(written)):
        damaged = bytearray(written)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = files.read_json(path, dict, "")
            assert found == content
        except UserError:
            refused += 1
    assert refused > 0.9 * 8 * len(written)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("best.json", {"step": "4", "metric": "fid", "value": 1.0}, '"step" is of type str'),
        ("best.json", {"step": 4, "metric": "fid"}, '"value" is missing'),
        ("vae.json", VAE | {"channels": ["a"]}, 'an entry of "channels" is of type str'),
        ("vae.json", VAE | {"scale": 0.5}, '"scale" is 0.5, not 0.18215'),
        ("manifest.json", MANIFEST | {"shards": [{"name": "x"}]}, '"records" is missing'),
        ("manifest.json", MANIFEST | {"shards": {}}, '"shards" is of type dict'),
        ("config.json", {"format": 2, "model": 3}, "config.json"),
        ("config.json", {"format": 1}, "'model'"),
        ("config.json", {"format": "2"}, "has format '2', but this version reads up to 2"),
        ("config.json", {"format": 2, "optimizer": {"ema_decay": 2.0}}, "ema_decay = 2.0 must be in"),
        ("config.json", {"format": 2, "optimizer": {"lr": 2.0}}, '"config.optimizer.lr" is unknown'),
    ],
)
def test_json_of_another_form_is_one_line(name, content, words, tmp_path):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=words) as error:
        READERS[name](tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_what_was_written_can_be_read(tmp_path):
    config = tiny.make_config()
    claim_workdir(str(tmp_path), config)
    assert load_config(str(tmp_path)) == config


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_output_that_is_no_file(make, tmp_path):
    make(tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"--out = .*x\.npz. is no file"):
        files.check_output(tmp_path / "x.npz", "--out")


def test_outputs_are_tried_before_the_work(tmp_path):
    files.check_output(tmp_path / "new" / "x.npz", "--out", ".png", ".npz")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(UserError, match=r"must end in \.png or \.npz"):
        files.check_output(tmp_path / "x.json", "--out", ".png", ".npz")
    files.check_directory(tmp_path / "a" / "b", "--out")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    for check in (files.check_output, files.check_directory):
        for place in (tmp_path / "file" / "x", "/proc/x", "/proc/self/x/y", tmp_path / ("x" * 300) / "y"):
            with pytest.raises(UserError, match=r"--out = .* cannot be written") as error:
                check(place, "--out")
            assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is no file"):
        files.check_output("", "--out")
