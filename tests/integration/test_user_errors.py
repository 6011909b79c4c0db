"""A user's mistake is one line that names the value and the fix, exit code 2, and nothing is written."""

import subprocess
import sys

import pytest

from dar_jax.checkpoint import claim_workdir
from dar_jax.config import default
from dar_jax.errors import UserError
from dar_jax.evaluation.sampling import sample_to_file
from dar_jax.training.loop import train
from dar_jax.validate import validate
from tests.training import tiny

DIGITS = "--config=configs/digits.py"
OWN_DICT = """
from ml_collections import ConfigDict
from dar_jax import config as config_lib

def get_config():
    config = ConfigDict(config_lib.default().to_dict())
    config.train.batchsize = 3
    return config
"""


def door(*args, code=None):
    command = ["-c", code] if code else ["-m", f"dar_jax.{args[0]}"]
    return subprocess.run([sys.executable, *command, *args[1:]], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["main", DIGITS, "--config.trian.batch_size=1"], ['"config.trian"', 'mean "train"']),
        (["main", DIGITS, "--config.train.batchsize=1"], ['"config.train.batchsize"', 'mean "batch_size"']),
        (["main", DIGITS, "--config.seed.x=1"], ["config.seed is a value"]),
        (["main", DIGITS, "--config.train.num_steps=ten"], ["config.train.num_steps", "ten"]),
        (["main", DIGITS + ":dynamik"], ['"dynamik"', 'mean "dynamic"']),
        (["main", "--config=configs/digit.py"], ['"configs/digit.py" is no file']),
        (["main", "--workdri=x", DIGITS], ["workdri", "workdir"]),
        (["main", DIGITS, "stray"], ['"stray"', "--name=value"]),
        (["main", DIGITS], ["--workdir is required"]),
        (["main"], ["--config is required"]),
        (["sample"], ["--workdir is required"]),
        (["main", DIGITS, "--workdir="], ['--workdir = "" is empty']),
        (["sample", "--num_per_label=0"], ["num_per_label=0"]),
        (["evaluate", "--samples=x.npz", "--reference= "], ["--reference", "is empty"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_flags(args, words, tmp_path):
    workdir = [] if "required" in words[0] or "empty" in words[0] else [f"--workdir={tmp_path}/run"]
    result = door(*args, *workdir)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert not list(tmp_path.iterdir())


def test_config_file_with_a_dict_of_its_own(tmp_path):
    """It bypasses the locked default, so the misspelt key shows only when the run checks it: exit code 2 too."""
    (tmp_path / "own.py").write_text(OWN_DICT)
    result = door("main", f"--config={tmp_path}/own.py", f"--workdir={tmp_path}/run")
    expected = 'error: config key "config.train.batchsize" is unknown. Did you mean "batch_size"?\n'
    assert (result.returncode, result.stderr) == (2, expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n1 / 0", "line 2: ZeroDivisionError: division by zero"),
        ("def get_config(:", "SyntaxError"),
        ("", "has no attribute 'get_config'"),
        ("import sys\nsys.exit(0)", "line 2: SystemExit: 0"),
        ("def get_config():\n    return {}['depth']", "line 2: KeyError: depth"),
        ("def get_config():\n    open('/nowhere')", "line 2: FileNotFoundError: [Errno 2] No such file"),
        ("def get_config():\n    pass", "must return a ConfigDict"),
    ],
)
def test_config_file_that_raises(text, words, tmp_path):
    (tmp_path / "own.py").write_text(text)
    result = door("main", f"--config={tmp_path}/own.py", f"--workdir={tmp_path}/run")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert result.stderr.startswith("error: ") and f"{tmp_path}/own.py" in result.stderr and words in result.stderr


@pytest.mark.parametrize("name", ["main", "sample", "evaluate"])
def test_help_does_not_import_jax(name):
    code = f"import sys; from absl import flags; from dar_jax import config, {name}; assert 'jax' not in sys.modules"
    assert door(name, code=code).returncode == 0
    result = door(name, "--help")
    assert result.returncode == 0
    assert "--workdir" in result.stdout


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.source": "digit"}, 'Did you mean "digits"'),
        ({"model.routing.chunk_size": 3}, r"chunk_size = 3 .* one of \[1, 2, 4\]"),
        ({"model.num_heads": 3}, "hidden_size = 16 .* num_heads = 3"),
        ({"model.patch_size": 3}, "input_size = 8 .* patch_size = 3"),
        ({"data.image_size": 16}, "image_size = 16 must equal"),
        ({"sampler.cfg_interval": (0.5, 0.2)}, r"cfg_interval = \(0.5, 0.2\)"),
        ({"sampler.cfg_interval": ("a", "b")}, r"cfg_interval\[0\] = 'a' must be of type float"),
        ({"optimizer.groups": (3,)}, r"groups\[0\] = 3 must be a regular expression and its settings"),
        ({"optimizer.groups": (("a", {"frozen": 1}),)}, r"groups\[0\].frozen = 1 must be of type bool"),
        ({"optimizer.groups": (("a", {"learning_rate": "x"}),)}, r"learning_rate = 'x' must be of type float"),
        ({"optimizer.groups": (("a", {"weight_decay": float("nan")}),)}, r"weight_decay = nan must be at least 0"),
        ({"sampler.cfg_channels": 2}, "cfg_channels = 2 .* config.model.channels = 1"),
        ({"eval.num_samples": 1}, "num_samples = 1 must be 0"),
        ({"eval.labels": "random_"}, 'Did you mean "random"'),
        ({"model.family": "mmdit", "model.text": "embedding"}, 'Did you mean "embeddings"'),
        ({"data.buckets": ("8x8",)}, "family = sit takes squares of one size"),
        ({"data.image_size": 4, "model.input_size": 4, "eval.every_steps": 5}, "image_size = 4 is not in 8..64"),
        ({"train.accumulate_steps": 3}, "batch_size = 16 must be divisible by accumulate_steps = 3"),
        ({"mesh.fsdp": 0}, "data = -1, fsdp = 0, tensor = 1: each must be at least 1"),
        ({"mesh.tensor": 0}, "tensor = 0: each must be at least 1"),
        ({"mesh.tensor": -1}, "data = -1, fsdp = 1, tensor = -1: .* one of them may be -1"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_values_that_cannot_work(fields, message):
    config = tiny.make_config()
    validate(config)
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_value_of_another_type():
    """A config that does not start from the default can hold what its fields would have refused."""
    config = tiny.make_config()
    with config.ignore_type():
        config.train.batch_size = "16"
    with pytest.raises(UserError, match=r"config.train.batch_size = '16' must be of type int"):
        validate(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train.batch_size": 12}, "= 12 must be divisible by the 8 devices"),
        ({"train.accumulate_steps": 4}, "= 4 must be divisible by the 8 devices"),
        ({"sampler.method": "sde_euler", "sampler.num_steps": 1}, "num_steps = 1 must be at least 2"),
        ({"data.source": "folder", "data.path": "/nowhere"}, '"/nowhere" is no directory'),
        ({"model.num_classes": 5}, "num_classes = 5 but the data has 10"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_run_that_cannot_start(fields, message, tmp_path):
    config = tiny.make_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        validate(config)
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["samples", "checkpoints"])
def test_workdir_with_a_file_for_a_folder(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"--workdir = .*/{name}. cannot be written: Not a directory"):
        claim_workdir(str(tmp_path), tiny.make_config())


@pytest.mark.parametrize(
    ("labels", "out", "message"),
    [
        (["1", "10"], "a.png", "--labels: 10 is no class; the model has classes 0 to 9"),
        (["x"], "a.png", "--labels: x is no class"),
        ([], "a.png", "--labels is empty"),
        (["1"], "a.jpg", "must end in .png or .npz"),
        (["1"], "config.json/a.png", "cannot be written"),
        (["1"], "a.png", "holds no checkpoint"),
        (["1"], "folder.npz", "is no file"),
    ],
)
def test_samples_that_cannot_be_drawn(labels, out, message, tmp_path):
    config = tiny.make_config()
    claim_workdir(str(tmp_path), config)
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UserError, match=message):
        sample_to_file(config, str(tmp_path), None, labels, 2, str(tmp_path / out))


def test_unknown_key_of_the_default_itself():
    with pytest.raises(UserError, match=r'"config.optimizer.lr" is unknown'):
        config = default()
        with config.unlocked():
            config.optimizer.lr = 1.0
        validate(config)
