"""The notebook runs from top to bottom on a tiny checkpoint, and is committed without its outputs."""

import json
import pathlib

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from tests.integration.test_diagnose import make_run
from tests.training import tiny

NOTEBOOK = json.loads((pathlib.Path(__file__).parents[2] / "notebooks/load_checkpoint.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_notebook_is_committed_without_outputs():
    assert NOTEBOOK["nbformat"] == 4 and len(CODE) > 4
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    make_run(tmp_path / "run", "dar")
    monkeypatch.setenv("WORKDIR", str(tmp_path / "run"))
    monkeypatch.setattr(plt, "show", lambda: None)
    before, names = matplotlib.get_backend(), {"__name__": "__main__"}
    with tiny.all_runs_on((1, 1), tmp_path / "cache"):
        plt.switch_backend("agg")
        for i, cell in enumerate(CODE):
            exec(compile("".join(cell["source"]), f"cell {i}", "exec"), names)
    samples, curves, maps = (plt.figure(number) for number in plt.get_fignums())
    plain, guided = (ax.images[0].get_array() for ax in samples.axes)
    assert plain.shape == guided.shape == (8 * 10, 10 * 10) and (plain != guided).any()
    drawn = [line.get_ydata() for ax in curves.axes for line in ax.lines]
    assert len(drawn) == 9 and all(np.isfinite(y).all() for y in drawn)
    weights = [ax.images[0].get_array() for ax in maps.axes if ax.images]
    assert len(weights) == 4
    for w in weights:
        np.testing.assert_allclose(w.sum(axis=0), 1, rtol=1e-5)
    plt.close("all")
    plt.switch_backend(before)
