"""The arithmetic of studies, and that the pages show the tables of the curves that are kept."""

import json
import pathlib
import sys

import numpy as np
import pytest
from scipy import stats

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "studies"))

import repa  # noqa: E402
import study  # noqa: E402
import text_to_image  # noqa: E402


def test_interval_is_that_of_student():
    for count in (2, 3, 10):
        values = np.random.default_rng(count).normal(size=count)
        low, high = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
        mean, half = study.interval(values)
        assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-3)


def test_differences_are_paired_by_seed_at_the_last_step():
    """A run that has not come to the last step has no part in it."""
    curves = {
        "a": {"0": {"1": {"m": 9.0}, "2": {"m": 1.0}}, "1": {"2": {"m": 5.0}}, "2": {"1": {"m": 70.0}}},
        "b": {"1": {"2": {"m": 3.0}}, "0": {"2": {"m": 0.5}}, "2": {"2": {"m": 0.0}}},
    }
    found = study.table(study.Study("x", "", {"a": (), "b": ()}, (), (0, 1, 2), [("a", "b")], ("m",)), curves)
    assert found.splitlines()[2].startswith("| `a` | 2 | 3 ")
    assert found.splitlines()[-1].startswith("| `a` - `b` | 2 | +1.25 ")


@pytest.mark.parametrize("declared", [repa.STUDY, text_to_image.STUDY], ids=lambda declared: declared.name)
def test_the_page_shows_the_table(declared):
    curves = json.loads((ROOT / "studies" / f"{declared.name}.json").read_text())["curves"]
    assert study.table(declared, curves) in (ROOT / "docs" / f"{declared.name}.md").read_text()
