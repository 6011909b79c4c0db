"""Checkpoints of a run: workdir/checkpoints/<step> by orbax, workdir/config.json beside them.

A checkpoint holds two items: "ema", the weights that samples come from, and "train", the other fields of the state.
A checkpoint of converted weights holds "ema" alone. The data need no third item, because a batch is a function of the
step. A step's directory appears under its final name only when it is whole, so a crash while saving leaves the last
good one. workdir/best.json names the checkpoint with the lowest score.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Iterable
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dar_jax import files
from dar_jax.config import check_fields, default
from dar_jax.errors import UserError
from dar_jax.logs import say

# The layout of config.json. 1: it had no number, and config.model had no field `space`.
FORMAT = 2

BEST = {"step": int, "metric": str, "value": int | float}  # the form of best.json
REMOVE_BEST = "remove it, and the next evaluation writes it again"

# What a run and its evaluations write to, tried before the run starts.
FOLDERS = ("checkpoints", "samples", "profile", "evaluation")

# What a run keeps for life: its function, its randomness, and what makes a batch of a step.
FIXED = ("model", "diffusion", "seed", "data.source", "data.name", "data.train_split", "train.batch_size")


def _items(state) -> dict[str, Any]:
    """The items of a state: any dataclass with the fields `step` and `ema`."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {"ema": fields.pop("ema"), "train": fields}


class _Best:
    """Preserves the checkpoint with the lowest score so far; workdir/best.json remembers which it is.

    Orbax's own BestN takes the score when it saves, but a checkpoint must be safe before its long evaluation.
    """

    def __init__(self, workdir: str):
        self.path = pathlib.Path(workdir) / "best.json"
        self.record = files.read_json(self.path, BEST, REMOVE_BEST) if self.path.exists() else None

    def note(self, step: int, steps: list[int], metric: str, value: float) -> None:
        best = self.record
        if best and best["metric"] == metric and best["value"] <= value and best["step"] in steps:
            return
        self.record = {"step": step, "metric": metric, "value": value}
        if jax.process_index() == 0:
            files.write_json(self.path, self.record)

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        return [self.record is not None and checkpoint.step == self.record["step"] for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of one workdir; saves in the background, keeps the latest `checkpoint.keep` and the best."""

    def __init__(self, workdir: str, keep: int):
        _set_incomplete_aside(workdir)
        self._best = _Best(workdir)
        policies = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            _directory(workdir),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), self._best]),
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, also of one whose save is under way; ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    @property
    def latest_step(self) -> int | None:
        return max(self.steps, default=None)

    def save(self, state, step: int) -> None:
        """Starts saving; returns when the state may be donated. A step that is already saved is left alone.

        If the one before failed, for want of room, say, its error is raised here.
        """
        if self.latest_step != step:
            self._checkpointer.save_checkpointables_async(step, _items(state))

    def note_score(self, step: int, metric: str, value: float) -> None:
        """Keeps the checkpoint of `step` for good if its score is the lowest yet of this metric."""
        self._best.note(step, self.steps, metric, value)

    def restore(self, abstract):
        """The latest state, of the type and on the shardings of `abstract`."""
        items = self._checkpointer.load_checkpointables(self.latest_step, _items(abstract))
        return type(abstract)(ema=items["ema"], **items["train"])

    def close(self) -> None:
        """Waits, and ends."""
        self._checkpointer.close()

    def wait(self) -> None:
        """Returns when the save under way is done; raises its error."""
        self._checkpointer.wait()


def _directory(workdir: str) -> pathlib.Path:
    return pathlib.Path(workdir).absolute() / "checkpoints"


def _parts(path: pathlib.Path) -> set[str]:
    """The items of a step directory, as its metadata lists them; empty unless all of them are there."""
    try:
        names = set(json.loads((path / "_CHECKPOINT_METADATA").read_text())["item_handlers"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return names if all((path / name).exists() for name in names) else set()


def _is_whole(path: pathlib.Path) -> bool:
    return _parts(path) in ({"train", "ema"}, {"ema"})


def _steps(workdir: str) -> list[int]:
    """Steps of the whole checkpoints, ascending."""
    return sorted(int(p.name) for p in _directory(workdir).glob("*") if p.name.isdigit() and _is_whole(p))


def latest_step(workdir: str) -> int | None:
    """Step of the latest whole checkpoint of `workdir`, from which a run there goes on; None if there is none."""
    return max(_steps(workdir), default=None)


def _set_incomplete_aside(workdir: str) -> None:
    """Renames step directories that lack a part (of a copy cut short, say), which orbax would take for the latest."""
    if jax.process_index() == 0:
        for path in _directory(workdir).glob("*"):
            if path.name.isdigit() and not _is_whole(path):
                aside = path.with_name(f"incomplete-{path.name}-{time.time_ns()}")
                path.rename(aside)
                say(f"{path} is incomplete: renamed to {aside.name} and not used")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("incomplete checkpoints set aside")


def saved_steps(workdir: str) -> list[int]:
    """Steps of the whole checkpoints, ascending. Raises UserError if there is none."""
    if steps := _steps(workdir):
        return steps
    raise UserError(f'workdir "{workdir}" holds no checkpoint; train with python -m dar_jax.main first.')


def restore_ema(workdir: str, abstract_params, step: int | None = None) -> tuple[Any, int]:
    """Returns (EMA weights, step) of a checkpoint, the latest by default. Raises UserError if there is none."""
    steps = saved_steps(workdir)
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f'workdir "{workdir}" has no checkpoint of step {step}; it has {steps}.')
    items = ocp.load_checkpointables(_directory(workdir) / str(step), {"ema": abstract_params})
    return items["ema"], step


def load_config(workdir: str) -> ConfigDict:
    """The config a workdir was trained with. Raises UserError if there is none, it is damaged or of a later format."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f'"{path}" does not exist; --workdir must be a directory that python -m dar_jax.main wrote.')
    stored = files.read_json(path, dict, "copy it again")
    number = stored.pop("format", 1)
    if number not in range(1, FORMAT + 1):
        raise UserError(f'"{path}" has format {number!r}, but this version reads up to {FORMAT}; update dar_jax.')
    config = default()
    try:
        if number == 1:
            stored["model"]["space"] = "pixels" if stored["model"]["channels"] in (1, 3) else "latents"
        with config.unlocked():
            config.update(stored)
        check_fields(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # of contents that no run has written
        raise UserError(f'"{path}" cannot be read ({error}); copy it again.') from error
    return config.lock()


def claim_workdir(workdir: str, config: ConfigDict) -> None:
    """Writes config.json, or raises UserError if the workdir holds a run that `config` cannot continue.

    The fields in `FIXED` must be those of the run; lengths, learning rate, logging and evaluation may change.
    """
    path = pathlib.Path(workdir)
    if steps := _steps(workdir):
        if "train" not in _parts(_directory(workdir) / str(steps[-1])):
            raise UserError(
                f'workdir "{workdir}" holds converted weights, not a run; take another --workdir, and start from them '
                f"with --config.init_from={workdir}."
            )
        if difference := first_difference(load_config(workdir), config, FIXED):
            raise UserError(
                f'workdir "{workdir}" holds a run with {difference}; take another --workdir, or the config of that run.'
            )
    if jax.process_index() == 0:
        for name in FOLDERS:
            files.check_directory(path / name, "--workdir")
        with files.writing(workdir, "--workdir"):
            path.mkdir(parents=True, exist_ok=True)
            files.write_json(path / "config.json", {"format": FORMAT, **json.loads(config.to_json())}, indent=2)


def write_weights(workdir: str, config: ConfigDict, params: dict) -> None:
    """Makes a workdir of converted weights: config.json and, as the EMA of step 0, `params`.

    Raises UserError if the workdir holds checkpoints or cannot be written.
    """
    if _steps(workdir):
        raise UserError(f'--output = "{workdir}" holds checkpoints; take another.')
    claim_workdir(workdir, config)
    ocp.save_checkpointables(_directory(workdir) / "0", {"ema": params})


@contextlib.contextmanager
def writing_to(workdir: str):
    """Turns the error of a disk that is full or cannot be written, from whichever library, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = re.search("No space left on device|Disk quota exceeded|File too large|Read-only file system", str(error))
        if not full:
            raise
        step = latest_step(workdir)
        kept = "No checkpoint was saved." if step is None else f"The checkpoint of step {step} is whole."
        raise UserError(
            f'workdir "{workdir}" cannot be written: {full[0]}. {kept} Make room, and the same command goes on.'
        ) from error


def first_difference(stored: ConfigDict, wanted: ConfigDict, fields: Iterable[str]) -> str | None:
    """`config.<field> = <stored>, not <wanted>` for the first of `fields` ("model.depth", "seed") that differs."""
    a, b = json.loads(stored.to_json()), json.loads(wanted.to_json())  # tuples and lists alike
    for field in fields:
        x, y = a, b
        for name in field.split("."):
            x, y = x[name], y[name]
        if difference := _difference(x, y, f"config.{field}"):
            return difference
    return None


def _difference(a, b, name: str) -> str | None:
    if isinstance(a, dict):
        found = (_difference(a[key], b[key], f"{name}.{key}") for key in a)
        return next(filter(None, found), None)
    return None if a == b else f"{name} = {a}, not {b}"
