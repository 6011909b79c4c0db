"""The arithmetic of studies, and that the pages show the tables of the curves that are kept."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "studies"))

import chunk_size  # noqa: E402
import distil  # noqa: E402
import distil_emoji  # noqa: E402
import does_it_help  # noqa: E402
import longer  # noqa: E402
import new_seeds  # noqa: E402
import prediction  # noqa: E402
import repa  # noqa: E402
import study  # noqa: E402
import text_to_image  # noqa: E402
import time_in_queries  # noqa: E402
from study_tables import best_name, first_step, holm, interval, rate_table, table, target_table, time_table  # noqa: E402


def test_interval_is_that_of_student():
    for count in (2, 3, 10):
        values = np.random.default_rng(count).normal(size=count)
        low, high = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
        mean, half = interval(values)
        assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-3)


def test_differences_are_paired_by_seed_at_the_last_step():
    """A run that has not come to the last step has no part in it."""
    curves = {
        "a": {"0": {"1": {"m": 9.0}, "2": {"m": 1.0}}, "1": {"2": {"m": 5.0}}, "2": {"1": {"m": 70.0}}},
        "b": {"1": {"2": {"m": 3.0}}, "0": {"2": {"m": 0.5}}, "2": {"2": {"m": 0.0}}},
    }
    found = table(study.Study("x", "", {"a": (), "b": ()}, (), (0, 1, 2), [("a", "b")], ("m",)), curves)
    assert found.splitlines()[2].startswith("| `a` | 2 | 3 ")
    assert found.splitlines()[-1].startswith("| `a` - `b` | 2 | +1.25 ")


def test_learning_rates_are_chosen_by_the_mean_of_the_first_metric():
    curves = {
        "a@0.1": {"0": {"9": {"m": 3.0, "n": 0.0}}, "1": {"9": {"m": 5.0, "n": 0.0}}},
        "a@0.2": {"0": {"9": {"m": 1.0, "n": 9.0}}, "1": {"9": {"m": 6.0, "n": 9.0}}},
        "b@0.1": {"0": {"9": {"m": 2.0, "n": 1.0}}, "1": {"9": {"m": 2.0, "n": 3.0}}},
    }
    swept = study.Study("x", "", {"a": (), "b": ()}, (), (0, 1), [("a", "b")], ("m", "n"), rates=(0.1, 0.2))
    assert best_name(swept, curves, "a") == "a@0.2" and best_name(swept, curves, "b") == "b@0.1"
    assert table(swept, curves).splitlines()[-1].startswith("| `a` - `b` | 2 | +1.5 ")
    assert rate_table(swept, curves).splitlines()[-1].endswith("| - |")


def test_rates_are_tried_until_the_best_is_inside(tmp_path, monkeypatch):
    """a is best at 4, b beyond all rates, c at 1; a rate that fails is not tried again."""
    best, ran = {"a": 4, "b": 99, "c": 1, "d": 99}, []

    def train_run(swept, one, root, machine, needs):
        ran.append((one.name, one.seed))
        return True

    def collect(swept, root):
        found = {}
        for name, seed in ran:
            cell, rate = name.split("@")
            if (cell, rate) != ("d", "8"):
                found.setdefault(name, {})[str(seed)] = {"9": {"m": abs(float(rate) - best[cell])}}
        return {"curves": found}

    monkeypatch.setattr(study, "_train_run", train_run)
    monkeypatch.setattr(study, "collect", collect)
    cells = {name: () for name in best}
    swept = study.Study("x", "", cells, (), (0, 1), [], ("m",), (2, 4), further_rates=(8, 1, 16), sweep_seeds=(0,))
    study.train(swept, tmp_path, study.Machine())
    by_cell = {cell: [name.split("@")[1] for name, seed in ran if name[0] == cell and seed == 0] for cell in cells}
    assert by_cell == {"a": ["2", "4", "8"], "b": ["2", "4", "8", "16"], "c": ["2", "4", "1"], "d": ["2", "4", "8"]}
    assert [name for name, seed in ran if seed == 1] == ["a@4", "b@16", "c@1", "d@4"]


def test_a_run_waits_for_its_teacher_and_the_first_network(tmp_path, monkeypatch):
    """And for nothing else. Once there is a network, only students wait."""
    waited = {}

    def train_run(declared, one, root, machine, needs):
        waited[f"{one.name}_{one.seed}"] = [need.result() for need in needs]
        return True

    monkeypatch.setattr(study, "_train_run", train_run)
    monkeypatch.setattr(study.concurrent.futures, "ThreadPoolExecutor", Inline)
    teacher = "--config.teacher={root}/teacher_{seed}"
    cells = {"teacher": ("residual",), "student": ("residual+dmd", teacher), "other": ("static",)}
    study.train(study.Study("x", "", cells, (), (0, 1), [], ("m",)), tmp_path, study.Machine(3))
    assert {name: len(needs) for name, needs in waited.items() if needs} == {"student_0": 1, "student_1": 1}
    waited.clear()
    declared = study.Study("x", "", cells, (), (0, 1), [], ("fd_convnet",), detail="other")
    study.train(declared, tmp_path, study.Machine(3))
    counts = {name: len(needs) for name, needs in waited.items()}
    assert counts == {"teacher_0": 0, "student_0": 2, "other_0": 1, "teacher_1": 1, "student_1": 2, "other_1": 1}
    (tmp_path / study.NETWORK).touch()
    study.train(declared, tmp_path, study.Machine(3))
    assert [len(needs) for needs in waited.values()] == [0, 1, 0, 0, 1, 0]


class Inline(study.concurrent.futures.Executor):
    """Runs what it is given at once."""

    def __init__(self, jobs):
        self.jobs = jobs

    def submit(self, function, *arguments):
        done = study.concurrent.futures.Future()
        done.set_result(function(*arguments))
        return done


def test_jobs_share_a_machine_until_its_time_is_over(tmp_path):
    """Each has its own cores and an even part of a GPU. A run that is told to end may save; none is started after."""
    child = """if True:
        import os, signal, sys, time
        print(sorted(os.sched_getaffinity(0)), os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"], flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved"))
        time.sleep(float(sys.argv[1]))
    """
    machine = study.Machine(2, minutes=5 / 60)
    assert machine.run([sys.executable, "-c", child, "0"], tmp_path / "0.txt") == 0 and not machine.stopped.is_set()
    with study.concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = [pool.submit(machine.run, [sys.executable, "-c", child, "60"], tmp_path / f"{i}.txt") for i in (1, 2)]
        assert [job.result() for job in running] == [1, 1] and machine.stopped.is_set()
    lines = [(tmp_path / f"{i}.txt").read_text().splitlines() for i in (1, 2)]
    assert [found[1:] for found in lines] == [["saved"]] * 2
    cores = [json.loads(found[0].split("] ")[0] + "]") for found in lines]
    assert sorted(cores[0] + cores[1]) == sorted(os.sched_getaffinity(0)) and lines[0][0].endswith("] 0.450")
    declared = study.Study("x", "", {"a": ("residual",)}, (), (0,), [])
    assert study.train(declared, tmp_path, machine) == []
    assert study._train_run(declared, study._Run("a", "a", None, 0), tmp_path, machine, [])
    assert not (tmp_path / "a_0").exists()


def test_a_study_whose_time_is_over_writes_over_nothing(tmp_path):
    """Its first run is told to end at once, which is no failure."""
    kept = ROOT / "studies" / "prediction.json"
    before = kept.read_bytes()
    command = [sys.executable, ROOT / "studies" / "prediction.py", f"--root={tmp_path}", "--minutes=0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "stopped after 0 minutes; the same command goes on" in done.stdout and kept.read_bytes() == before


def test_holm_equals_its_definition():
    """Of p-values .01, .04, .03, .005: 4 * .005, 3 * .01, 2 * .03, and .04 is raised to the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_steps_to_a_target_are_censored_and_interpolated():
    steps = {"10": {"m": 4.0}, "20": {"m": 2.0}, "30": {"m": 3.0}}
    assert first_step(steps, "m", 3.0) == 15 and first_step(steps, "m", 5.0) == 10
    assert first_step(steps, "m", 1.0) == float("inf")
    declared = study.Study("x", "", {"a": ()}, (), (0, 1), [], ("m",), targets=(3.0, 1.0))
    kept = {"curves": {"a": {"0": steps, "1": {"10": {"m": 3.0}, "20": {"m": 1.0}}}}, "seconds": {"a": {"0": 6.0}}}
    assert "| 12 ± 32 steps, 1.2 min | 1 of 2 runs |" in target_table(declared, kept)


def test_at_equal_time_a_slow_cell_has_made_fewer_steps():
    """b takes twice the time of a, so it is at step 5 when a ends; there it has 3, and a has 2."""
    curves = {
        name: {seed: {"5": {"m": m + 2}, "10": {"m": m}} for seed in "01"} for name, m in (("a", 2.0), ("b", 1.0))
    }
    declared = study.Study("x", "", {"a": (), "b": ()}, (), (0, 1), [], ("m",))
    table = time_table(declared, {"curves": curves, "pace": {"a": [1.0, 9.0, 0.5], "b": [2.0]}}).splitlines()
    assert "m at step 10 | after 10 s" in table[0]
    assert table[2:] == [
        "| `a` | 1000 | 1.00 | 2 ± 0 | 2 ± 0 | +0 ± 0 |",
        "| `b` | 2000 | 2.00 | 1 ± 0 | 3 ± 0 | +1 ± 0 |",
    ]


def test_other_seeds_have_no_say_in_the_rate():
    """The sweep is of seed 0 alone, where a rate of 2 is better."""
    found = {"0": {"9": {"m": 1.0}}, "1": {"9": {"m": 8.0}}}
    curves = {"a@1": {"0": {"9": {"m": 2.0}}}, "a@2": found}
    swept = study.Study("x", "", {"a": ()}, (), (0, 1), [], ("m",), rates=(1, 2), sweep_seeds=(0,))
    assert best_name(swept, curves, "a") == "a@2"
    assert rate_table(swept, curves).splitlines()[-1] == "| `a` | 2 | 1 |"
    assert table(swept, curves).splitlines()[2].startswith("| `a@2` | 2 | 4.5 ")


CONFIG_FILE = """
from dar_jax import config as config_lib
from tests.training import tiny

def get_config(variant):
    config = tiny.make_config()
    config.eval.update(every_steps=12, num_samples=0, grid_size=1, loss_images=32)
    return config_lib.route(config, variant)
"""
TRAIN = """import study
study.train(study.Study(*{!r}, seeds=(0,), differences=()), study.pathlib.Path({!r}), study.Machine())
"""


def test_a_killed_study_goes_on_to_the_same_table(tmp_path):
    """Two studies of two runs each, of which one is killed with all its processes while its second run trains."""
    (tmp_path / "config.py").write_text(CONFIG_FILE)
    declared = ("x", str(tmp_path / "config.py"), {"residual": ("residual",), "static_t": ("static_t",)}, ())
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'studies'}", "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def start(name):
        command = [sys.executable, "-c", TRAIN.format(declared, str(tmp_path / name))]
        return subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)

    assert start("whole").wait(500) == 0
    process, log = start("killed"), tmp_path / "killed" / "static_t_0" / "metrics.jsonl"
    while not log.exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert start("killed").wait(500) == 0
    both = study.Study(*declared, seeds=(0,), differences=[("static_t", "residual")], metrics=("val_loss", "loss"))
    tables = [table(both, study.collect(both, tmp_path / name)["curves"]) for name in ("whole", "killed")]
    assert tables[0] == tables[1] and "nan ± nan" not in tables[0].replace("± nan", "")


PAGES = (
    (repa.STUDY, "repa"),
    (text_to_image.STUDY, "text_to_image"),
    (distil.STUDY, "distil"),
    (distil_emoji.STUDY, "distil"),
    (does_it_help.STUDY, "does_it_help"),
    (new_seeds.STUDY, "does_it_help"),
    (longer.STUDY, "does_it_help"),
    (chunk_size.STUDY, "does_it_help"),
    (prediction.STUDY, "does_it_help"),
)


@pytest.mark.parametrize(("declared", "page"), PAGES, ids=lambda x: getattr(x, "name", ""))
def test_the_page_shows_the_table(declared, page):
    kept = json.loads((ROOT / "studies" / f"{declared.name}.json").read_text())
    assert table(declared, kept["curves"]) in (ROOT / "docs" / f"{page}.md").read_text()


def test_the_page_shows_what_shuffled_times_do():
    kept = json.loads(time_in_queries.KEPT.read_text())
    assert time_in_queries.table(kept) in (ROOT / "docs" / "does_it_help.md").read_text()
