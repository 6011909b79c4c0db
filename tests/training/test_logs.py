"""metrics.jsonl of a resumed run reads as one uninterrupted run, with TensorBoard or without."""

import json
import os
import sys

import pytest

from dar_jax.errors import UserError
from dar_jax.logs import Logs


def test_resumed_run_drops_what_it_takes_again(tmp_path):
    """Lines after the restored step and a line cut short by a crash go; what was logged before stays as it is."""
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {i}, "loss": 0.{i}}}' for i in range(1, 6)]
    path.write_text("\n".join([*lines, '{"step": 6, "lo']))
    logs = Logs(str(tmp_path), first_step=4, num_steps=10, batch_size=8, flops_per_step=3e12)
    logs.progress(5, {"loss": 0.7})
    logs.close()
    written = path.read_text().splitlines()
    assert written[:4] == lines[:4]
    last = json.loads(written[4])
    assert (last["step"], last["loss"]) == (5, 0.7)
    assert last["images_per_second"] == last["steps_per_second"] * 8
    assert last["model_tflops_per_second"] == pytest.approx(last["steps_per_second"] * 3)
    assert "mfu" not in last
    assert len(written) == 5


def test_damaged_lines_are_left_out_and_said(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": 0.5}'
    path.write_bytes(
        "\n".join([whole, "[1]", '{"step": "x"}', "", whole]).encode() + b"\n\xff\xfe\n" + b'{"step": 2, "lo'
    )
    Logs(str(tmp_path), first_step=4, num_steps=10, batch_size=8, flops_per_step=1.0).close()
    assert path.read_text() == f"{whole}\n{whole}\n"
    assert capsys.readouterr().out == f"{path}: 4 damaged lines are left out\n"


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
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}
