"""metrics.jsonl of a resumed run reads as one uninterrupted run, with TensorBoard or without."""

import contextlib
import json
import os
import sys

import pytest

from dar_jax.errors import UserError
from dar_jax.logs import Logs, read_metrics
from dar_jax.training import loop


def test_resumed_run_drops_what_it_takes_again(tmp_path):
    """Lines after the restored step and a line cut short by a crash go; what was logged before stays as it is."""
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {i}, "loss": 0.{i}}}' for i in range(1, 6)]
    path.write_text("\n".join([*lines, '{"step": 6, "lo']))
    logs = Logs(str(tmp_path), first_step=4, num_steps=10, batch_size=8, flops_per_step=3e12)
    logs.progress(5, {"loss": 0.7})
    logs.close()
    *before, last = read_metrics(tmp_path)
    assert before == [json.loads(line) for line in lines[:4]]
    assert (last["step"], last["loss"]) == (5, 0.7)
    assert last["images_per_second"] == last["steps_per_second"] * 8
    assert last["model_tflops_per_second"] == pytest.approx(last["steps_per_second"] * 3)
    assert "mfu" not in last


def test_damaged_lines_are_left_out_and_said(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": 0.5}'
    path.write_bytes(
        "\n".join([whole, "[1]", '{"step": "x"}', "", whole]).encode() + b"\n\xff\xfe\n" + b'{"step": 2, "lo'
    )
    Logs(str(tmp_path), first_step=4, num_steps=10, batch_size=8, flops_per_step=1.0).close()
    out = capsys.readouterr().out
    assert read_metrics(tmp_path) == [json.loads(whole)] * 2
    assert out == f"{path}: 5 lines that are damaged, or that a crash cut short, are left out\n"


def test_one_changed_digit_is_damage(tmp_path, capsys):
    logs = Logs(str(tmp_path), first_step=0, num_steps=10, batch_size=8, flops_per_step=1.0)
    for step in (1, 2):
        logs.write(step, {"loss": 0.5})
    logs.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace("0.5", "0.4", 1))
    capsys.readouterr()
    assert read_metrics(tmp_path) == [{"step": 2, "loss": 0.5}]
    assert capsys.readouterr().out.startswith(f"{path}: 1 lines that are damaged")


@pytest.mark.parametrize(
    ("steps", "first_step", "words"),
    [
        ([], 40, "it has no lines of steps 1 to 40"),  # emptied, or removed
        ([10, 20], 40, "it has no lines of steps 21 to 40"),
        ([10, 20], 30, "it has no lines of steps 21 to 30"),
        ([10, 20], 29, None),
        ([50, 100], 140, None),  # of a run that logged less often before
        ([], 9, None),
    ],
)
def test_lines_that_are_gone_are_told(steps, first_step, words, tmp_path, capsys):
    logs = Logs(str(tmp_path), first_step=0, num_steps=200, batch_size=8, flops_per_step=1.0)
    for step in steps:
        logs.write(step, {"loss": 0.5})
    logs.close()
    if not steps:
        (tmp_path / "metrics.jsonl").write_text("")
    resumed = Logs(str(tmp_path), first_step=first_step, num_steps=200, batch_size=8, flops_per_step=1.0)
    capsys.readouterr()
    resumed.say_what_is_missing(first_step, 10)
    resumed.close()
    assert capsys.readouterr().out == (f"{tmp_path}/metrics.jsonl is damaged: {words}\n" if words else "")


def test_metrics_that_cannot_be_written(tmp_path):
    os.mkdir(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r'metrics\.jsonl" is no file'):
        Logs(str(tmp_path), first_step=4, num_steps=10, batch_size=8, flops_per_step=1.0)


@pytest.mark.parametrize("missing", ["tensorflow", "clu"])
def test_without_tensorboard_the_numbers_are_written(missing, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "clu"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # importing it raises ImportError
    logs = Logs(str(tmp_path), first_step=0, num_steps=10, batch_size=8, flops_per_step=1.0)
    assert "TensorBoard is off" in capsys.readouterr().out
    logs.write(1, {"loss": 0.5})
    logs.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]


def test_a_profile_beside_a_library_without_its_tpu_is_an_error(monkeypatch):
    """jax would crash. It does not where the environment names the platform."""
    monkeypatch.setattr(loop.importlib.util, "find_spec", lambda name: name == "libtpu")
    for platforms in (None, "cpu"):
        monkeypatch.setattr(type(loop.jax.config), "jax_platforms", platforms)
        with (
            contextlib.nullcontext()
            if platforms
            else pytest.raises(UserError, match="set JAX_PLATFORMS=cpu in the env")
        ):
            loop._Profile("workdir", 0, 2)
    monkeypatch.setattr(type(loop.jax.config), "jax_platforms", None)
    loop._Profile("workdir", 0, 0)
