"""metrics.jsonl of a resumed run reads as one uninterrupted run."""

import json

import pytest

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
