"""The script that is run where a GPU or TPU is, tried with tiny shapes on a CPU."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def test_checks_and_times_on_a_cpu(tmp_path):
    """Kernels are interpreted."""
    command = [sys.executable, ROOT / "benchmarks" / "on_gpu.py", "--smoke", "--rounds=1", f"--out={tmp_path}"]
    done = subprocess.run([*command, "--parts=checks,aggregation"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    rows = found["checks"]["rows"]
    assert len(rows) == 7 and all(0 < row["error"] < row["bound"] for row in rows)
    assert [row["sources"] for row in found["aggregation"]["rows"]] == [15, 57, 15, 57]
    page = (tmp_path / "page.md").read_text()
    assert "7 of 7 within their bounds" in page and "## Aggregation" in page


def test_what_is_not_a_number_is_wrong(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    on_gpu = importlib.import_module("on_gpu")
    assert on_gpu.relative([1.0, float("nan")], [1.0, 1.0]) != on_gpu.relative([1.0, 1.0], [1.0, 1.0]) == 0
    rows = [{"check": name, "error": error, "bound": 0.1} for name, error in (("a", 0.01), ("b", float("nan")))]
    page = on_gpu.page({"checks": {"device": "x", "commit": "z", "rows": rows}})
    assert "1 of 2 within their bounds" in page and "Measured: device x, commit z." in page
    assert on_gpu.wrong(rows) == ["b"]


def test_a_study_that_cannot_run_is_one_line(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    on_gpu = importlib.import_module("on_gpu")
    with pytest.raises(SystemExit, match=r'error: --study names "nothing"; there is no .*nothing\.py'):
        on_gpu.run_study("nothing", tmp_path, [])
    monkeypatch.setattr(on_gpu.subprocess, "run", lambda *_, **__: pytest.fail("it was run"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "grain" else name)
    with pytest.raises(SystemExit, match="error: --study needs grain; put the wheels on PYTHONPATH"):
        on_gpu.run_study("does_it_help", tmp_path, [])


def test_a_study_gets_what_follows(tmp_path):
    """Its flags and an absolute root; and what is kept of an earlier one is not written over with nothing."""
    kept = ROOT / "studies" / "prediction.json"
    before = kept.read_bytes()
    command = [sys.executable, ROOT / "benchmarks" / "on_gpu.py", "--study=prediction", "--out=out", "--", "--train=0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    root = tmp_path / "out" / "prediction"
    assert (done.returncode, done.stderr) == (1, f"error: no run of prediction has ended; see {root}.\n")
    assert kept.read_bytes() == before
