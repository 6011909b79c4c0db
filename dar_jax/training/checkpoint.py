"""Checkpoints of a run: workdir/checkpoints/<step> by orbax, workdir/config.json beside them.

A checkpoint holds three items: "train" (step, params, optimizer state), "ema", and "data" (the iterator). A step's
directory appears under its final name only when it is whole, so a crash while saving leaves the last good one.
"""

import json
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from ml_collections import ConfigDict

from dar_jax.config import default
from dar_jax.errors import UserError
from dar_jax.training.state import TrainState


def _items(state: TrainState) -> dict[str, Any]:
    return {
        "train": {"step": state.step, "params": state.params, "opt_state": state.opt_state},
        "ema": state.ema,
    }


class Checkpoints:
    """The checkpoints of one workdir; saves in the background, keeps the latest `checkpoint.keep`."""

    def __init__(self, workdir: str, keep: int):
        self._checkpointer = ocp.training.Checkpointer(
            _directory(workdir),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, iterator, step: int) -> None:
        """Starts saving; returns when the state may be donated. A step that is already saved is left alone."""
        if self.latest_step != step:
            self._checkpointer.save_checkpointables_async(step, {**_items(state), "data": iterator})

    def restore(self, abstract: TrainState, iterator) -> TrainState:
        """The latest state, on the shardings of `abstract`; sets `iterator` to where it was."""
        items = self._checkpointer.load_checkpointables(self.latest_step, {**_items(abstract), "data": iterator})
        train = items["train"]
        return TrainState(train["step"], train["params"], items["ema"], train["opt_state"])

    def close(self) -> None:
        """Waits for the save under way."""
        self._checkpointer.close()


def _directory(workdir: str) -> pathlib.Path:
    return pathlib.Path(workdir).absolute() / "checkpoints"


def restore_ema(workdir: str, abstract_params, step: int | None = None) -> tuple[Any, int]:
    """Returns (EMA weights, step) of a checkpoint, the latest by default. Raises UserError if there is none."""
    directory = _directory(workdir)
    steps = sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit())
    if not steps:
        raise UserError(f'workdir "{workdir}" holds no checkpoint; train with python -m dar_jax.main first.')
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f'workdir "{workdir}" has no checkpoint of step {step}; it has {steps}.')
    items = ocp.load_checkpointables(directory / str(step), {"ema": abstract_params})
    return items["ema"], step


def load_config(workdir: str) -> ConfigDict:
    """The config a workdir was trained with. Raises UserError if there is none."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f'"{path}" does not exist; --workdir must be a directory that python -m dar_jax.main wrote.')
    config = default()
    with config.unlocked():
        config.update(json.loads(path.read_text()))
    return config.lock()


def claim_workdir(workdir: str, config: ConfigDict) -> None:
    """Writes config.json, or raises UserError if the workdir holds a run that `config` cannot continue.

    The model, its objective and the seed must be those of the run; lengths, learning rate, logging and evaluation may change.
    """
    path = pathlib.Path(workdir)
    if any(_directory(workdir).glob("[0-9]*")):
        stored = json.loads(load_config(workdir).to_json())
        wanted = json.loads(config.to_json())
        for section in ("model", "diffusion", "seed"):
            difference = _first_difference(stored[section], wanted[section], f"config.{section}")
            if difference:
                raise UserError(
                    f'workdir "{workdir}" holds a run with {difference}; take another --workdir, or the config of that run.'
                )
    if jax.process_index() == 0:
        try:
            path.mkdir(parents=True, exist_ok=True)
            temporary = path / "config.json.tmp"
            temporary.write_text(config.to_json(indent=2) + "\n")
            os.replace(temporary, path / "config.json")
        except OSError as error:
            raise UserError(f'--workdir = "{workdir}" cannot be written: {error.strerror}.') from error


def _first_difference(stored, wanted, name: str) -> str | None:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in stored:
            difference = _first_difference(stored[key], wanted.get(key), f"{name}.{key}")
            if difference:
                return difference
        return None
    return None if stored == wanted else f"{name} = {stored}, not {wanted}"
