"""An MM-DiT on captions from end to end: trained, evaluated, resumed, sampled by prompt, diagnosed."""

import json

import numpy as np
import pytest
from PIL import Image

from dar_jax.checkpoint import load_config
from dar_jax.data import sources
from dar_jax.diagnosis.runs import diagnose
from dar_jax.errors import UserError
from dar_jax.evaluation.sampling import sample_to_file
from dar_jax.training import loop
from tests.training import tiny

SHAPES = ("red square", "red disc", "blue square", "blue disc")


class Shapes(sources.ArraySource):
    """Captioned discs and squares of 8x8 pixels; the attribute of a label is its colour."""

    def __init__(self, count):
        labels = np.arange(count) % 4
        images = np.full((count, 8, 8, 3), 255, np.uint8)
        y, x = np.mgrid[:8, :8] - 3.5
        masks = [np.maximum(abs(y), abs(x)) < 3, y**2 + x**2 < 10]
        for image, label in zip(images, labels, strict=True):
            image[masks[label % 2]] = [(200, 0, 0), (0, 0, 200)][label // 2]
        super().__init__(images, labels, 4)
        self.captions = [SHAPES[label] for label in labels]
        self.attributes = {"colour": np.array([0, 0, 1, 1])}

    def __getitem__(self, index):
        return {**super().__getitem__(index), "caption": self.captions[index]}


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "shapes", lambda data, split: Shapes(64 if split == "train" else 8))
    config = tiny.make_config()
    config.data.source = "shapes"
    config.model.update(family="mmdit", channels=3, text_length=4, text_size=16, text_depth=1)
    config.model.routing.update(chunk_size=2, streams="both")
    config.train.num_steps = 4
    config.eval.update(every_steps=4, num_samples=8, final_samples=8, grid_size=2, loss_images=8)
    return config


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_on_captions(config, tmp_path, capsys):
    with tiny.all_runs_on((2, 2), tmp_path / "cache"):
        loop.train(config, str(tmp_path / "whole"))
        config.train.num_steps = 2
        loop.train(config, str(tmp_path / "parts"))
        config.train.num_steps = 4
        loop.train(config, str(tmp_path / "parts"))
        whole, parts = (
            [line["loss"] for line in lines_of(tmp_path / name) if "loss" in line] for name in ("whole", "parts")
        )
        assert whole == parts and len(whole) == 4
        scores = lines_of(tmp_path / "whole")[-1]
        assert {"fd_convnet", "val_loss", "accuracy/colour", "accuracy_seen/colour"} <= set(scores)
        run = load_config(str(tmp_path / "whole"))
        assert tuple(run.model.words) == ("blue", "disc", "red", "square")
        run.sampler.num_steps = 1
        sample_to_file(run, str(tmp_path / "whole"), None, ["red disc", "blue"], 2, str(tmp_path / "grid.png"))
        assert Image.open(tmp_path / "grid.png").mode == "RGB"
        with pytest.raises(UserError, match='does not know "green"'):
            sample_to_file(run, str(tmp_path / "whole"), None, ["green disc"], 1, str(tmp_path / "grid.png"))
        settings = {"num_images": 8, "timesteps": (0.25, 0.75), "batch_size": 8}
        with pytest.raises(UserError, match="--canonical is not there"):
            diagnose([run], [str(tmp_path / "whole")], str(tmp_path / "d"), canonical=True, **settings)
        config.model.words = ("red", "green")
        with pytest.raises(UserError, match=r"config\.model\.words = \['blue', 'disc', 'red', 'square'\]"):
            loop.train(config, str(tmp_path / "whole"))
