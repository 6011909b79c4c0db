"""The short form of the soak (benchmarks/soak.py), and what its oracle calls lost and wrong."""

import json
import random

import pytest

from tests.soak import processes
from tests.soak.faults import Soak
from tests.soak.oracle import BAD, compare, summarise, table


@pytest.fixture(scope="module")
def soak(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in (*processes.ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR"):
            patch.setenv(name, "")  # restored at the end, whatever the soak sets
        yield Soak(tmp_path_factory.mktemp("soak"))


@pytest.mark.parametrize(
    ("fault", "settings"),
    [
        (Soak.damage_read, {"kind": "data"}),
        (Soak.damage_read, {"kind": "vae"}),
        (Soak.bad_number, {"count": 3}),
        (Soak.kill_training, {"kind": "latents", "times": 2}),
    ],
    ids=["data", "vae", "numbers", "kill"],
)
def test_faults_do_no_harm(soak, fault, settings):
    faults = list(fault(soak, random.Random(0), **settings))
    assert faults
    assert [each for each in faults if each.verdict in BAD] == []


def test_the_oracle_sees_what_is_wrong_and_what_is_lost():
    wanted = {"metrics 1 loss": 0.5, "grid": "ab"}
    assert compare(wanted, wanted)[0] == "recovered"
    assert compare({**wanted, "metrics 1 loss": 0.25}, wanted)[0] == "wrong"
    assert compare({"grid": "ab"}, wanted)[0] == "lost"
    assert compare({"grid": "ab"}, wanted, said="1 lines that are damaged are left out")[0] == "recovered"


def test_the_page_shows_the_counts():
    with open("docs/soak.json") as file:
        text = table(json.load(file))
    with open("docs/reliability.md") as file:
        assert text in file.read()
    assert "| x | 2 | 1 | 0 | 0 | 0 | 0 | 1 |" in table(
        summarise([{"class": "x", "verdict": "recovered"}, {"class": "x", "verdict": "hung"}])
    )
